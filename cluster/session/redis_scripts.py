"""What runs on the Redis that has the journals: each change of a session's three hashes as one script.

Owns: the scripts, and the version of what they store. Knows nothing of who asks, and how turns are packed
(redis_journal.py).

KEYS of all of them: the session's `session`, `index` and `turns`. An answer begins with what became of it; `newer`,
with the version: a later program's journal is left alone.
"""

from __future__ import annotations

# Of what is stored.
VERSION = 1
# Sums of checksums are taken in it: a script's numbers are exact to 2^53.
SUM = 1 << 40

_REFUSE_NEWER = f"""
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0')
if version > {VERSION} then return {{'newer', tostring(version)}} end
"""
# ARGV: how many of the rest are a new session's fields and values, these, then the node that begins a turn ('': none
# does), and then fields and by how much they rise. The answer ends with the node that began the turn before.
RAISE = (
    _REFUSE_NEWER
    + """
local first = tonumber(ARGV[1]) + 2
if version == 0 then redis.call('HSET', KEYS[1], unpack(ARGV, 2, first - 1)) end
local seat = redis.call('HGET', KEYS[1], 'seat') or ''
if ARGV[first] ~= '' then redis.call('HSET', KEYS[1], 'seat', ARGV[first]) end
for i = first + 1, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
return {'ok', redis.call('HGETALL', KEYS[1]), seat}
"""
)
# ARGV: the node. Of a session that there is.
SEAT = (
    _REFUSE_NEWER
    + """
if version > 0 then redis.call('HSET', KEYS[1], 'seat', ARGV[1]) end
return {'ok'}
"""
)
# ARGV: the epoch that a new session would have; the turn's epoch, request, kept tokens, kept chars, checksum, row,
# length with what is kept, time; the model's fingerprint.
COMMIT = (
    _REFUSE_NEWER
    + f"""
local epoch = ARGV[2]
local stored = redis.call('HGET', KEYS[2], epoch)
if stored and cmsgpack.unpack(stored)[1] == ARGV[3] then return {{'stored'}} end
local current = redis.call('HGET', KEYS[1], 'epoch') or ARGV[1]
if stored or current ~= epoch then return {{'stale', current}} end
local sum = tonumber(redis.call('HGET', KEYS[1], 'checksum'))
local turns = redis.call('HGETALL', KEYS[2])
for i = 1, #turns, 2 do
    local turn = cmsgpack.unpack(turns[i + 1])
    if turn[2] >= tonumber(ARGV[4]) and turn[3] >= tonumber(ARGV[5]) then
        sum = (sum - turn[4]) % {SUM}
        redis.call('HDEL', KEYS[2], turns[i])
        redis.call('HDEL', KEYS[3], turns[i])
    end
end
local index = cmsgpack.pack({{ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])}})
redis.call('HSET', KEYS[2], epoch, index)
redis.call('HSET', KEYS[3], epoch, ARGV[7])
redis.call('HINCRBY', KEYS[1], 'turns', 1)
redis.call('HSET', KEYS[1], 'checksum', string.format('%.0f', (sum + tonumber(ARGV[6])) % {SUM}),
           'num_tokens', ARGV[8], 'last_used', ARGV[9], 'fingerprint', ARGV[10])
return {{'ok'}}
"""
)
# ARGV: how many of the rest are the session's fields and values, these, and then for each turn its epoch, index, row.
FILL = """
if redis.call('EXISTS', KEYS[1]) == 1 then return {'there'} end
local first = tonumber(ARGV[1]) + 2
redis.call('HSET', KEYS[1], unpack(ARGV, 2, first - 1))
for i = first, #ARGV, 3 do
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
    redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 2])
end
return {'ok'}
"""
CLEAR = (
    _REFUSE_NEWER
    + """
redis.call('DEL', KEYS[2], KEYS[3])
if version > 0 then redis.call('HSET', KEYS[1], 'turns', 0, 'checksum', 0, 'num_tokens', 0) end
return {'ok'}
"""
)
