// Elements. Owns: how text gets into the page, which is as text and never as markup.

/** An element with attributes, listeners (`onclick: f`) and children (elements, or anything else as text). */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, String(value));
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Sets text where it has changed: selections and focus stay. */
export function say(element, text) {
  const wanted = text == null ? "" : String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

/** Children keyed by `keyOf(item)`: kept, moved, made or removed, so that focus outlives an update. */
export function keyed(parent, items, keyOf, make, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = old.get(key);
    if (child) old.delete(key);
    else {
      child = make(item);
      child.dataset.key = key;
    }
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    update(child, item);
  }
  for (const child of old.values()) child.remove();
}

const SVG = "http://www.w3.org/2000/svg";

/** A line through `values` (null: a gap), from 0 to their greatest. */
export function sparkline(values, label) {
  const [width, height] = [120, 26];
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "spark");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const most = Math.max(...values.filter((v) => v != null), 0) || 1;
  const slots = 60;
  let line = "", area = "", open = false, lastX = 0;
  values.slice(-slots).forEach((value, index, shown) => {
    if (value == null) {
      if (open) area += `L${lastX} ${height}Z`;
      open = false;
      return;
    }
    const x = ((slots - shown.length + index) / (slots - 1)) * width;
    const y = height - 1.5 - (value / most) * (height - 4);
    line += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    area += open ? `L${x.toFixed(1)} ${y.toFixed(1)}` : `M${x.toFixed(1)} ${height}L${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
    lastX = x.toFixed(1);
  });
  if (open) area += `L${lastX} ${height}Z`;
  for (const [name, d] of [["area", area], ["line", line]]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", name);
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}
