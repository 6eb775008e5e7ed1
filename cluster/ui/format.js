// Numbers as people read them. Owns: units and digits.

export function bytes(count) {
  if (count == null) return "–";
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(count >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return count ? `${count} B` : "0";
}

export function seconds(count) {
  if (count == null) return "–";
  if (count < 60) return `${Math.floor(count)} s`;
  if (count < 3600) return `${Math.floor(count / 60)} min`;
  if (count < 172800) return `${Math.floor(count / 3600)} h`;
  return `${Math.floor(count / 86400)} d`;
}

export function latency(value) {
  if (value == null) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

const GROUPED = new Intl.NumberFormat("en");
export const count = (value) => (value == null ? "–" : GROUPED.format(value));
export const rate = (value) => (value == null ? "–" : value >= 100 ? GROUPED.format(Math.round(value)) : value.toFixed(1));
export const percent = (share) => `${(share * 100).toFixed(share < 0.1 && share > 0 ? 1 : 0)} %`;
export const clock = (time) => new Date(time * 1000).toTimeString().slice(0, 8);
