"""The Lua scripts of the Redis history store; each runs alone on the server, whole or not at all.

A record is 13 bytes: time (64 bits, big-endian, sign flipped), item key, action. Times are compared as two numbers of
32 bits: Lua's own numbers are doubles, and its comparison of strings follows the server's locale.
"""

APPLY = """
-- prefix, log, expected position, new position, bound, then (operation, user, data) each.
-- Gives 0, changing nothing, if the log is not at the expected position.
local prefix, log, bound, size = ARGV[1], ARGV[2], tonumber(ARGV[5]), 13
if (redis.call('HGET', prefix .. 'at', log) or '') ~= ARGV[3] then return 0 end

local function later(a, i, b, j)
  local high, low = struct.unpack('>I4I4', a, i)
  local other_high, other_low = struct.unpack('>I4I4', b, j)
  return high > other_high or (high == other_high and low > other_low)
end

local function merge(old, new)
  -- The first old record later than the first new one.
  local low, high = 0, #old / size
  while low < high do
    local middle = math.floor((low + high) / 2)
    if later(old, middle * size + 1, new, 1) then high = middle else low = middle + 1 end
  end
  local i, j, parts = low * size + 1, 1, {string.sub(old, 1, low * size)}
  while i <= #old and j <= #new do
    if later(old, i, new, j) then
      parts[#parts + 1] = string.sub(new, j, j + size - 1)
      j = j + size
    else
      parts[#parts + 1] = string.sub(old, i, i + size - 1)
      i = i + size
    end
  end
  parts[#parts + 1] = string.sub(old, i)
  parts[#parts + 1] = string.sub(new, j)
  return table.concat(parts)
end

local function drop_unknown(user, gone)
  local notes = prefix .. 'x:' .. user
  if redis.call('EXISTS', notes) == 0 then return end
  local entries = redis.call('LRANGE', notes, 0, -1)
  for i = 1, #gone, size do
    if string.sub(gone, i + 8, i + 11) == '\\255\\255\\255\\255' then
      local record = string.sub(gone, i, i + size - 1)
      for place, entry in ipairs(entries) do
        if string.sub(entry, 1, size) == record then
          redis.call('LREM', notes, 1, entry)
          table.remove(entries, place)
          break
        end
      end
    end
  end
  if #entries == 0 then redis.call('SREM', prefix .. 'unknown', user) end
end

local function forget(user, everywhere)
  -- In the views of other snapshots too when it is first heard of, and not again: the user may have come back there.
  local views = everywhere and redis.call('ZRANGE', 'recsys:views', 0, -1) or {prefix}
  for _, view in ipairs(views) do
    redis.call('DEL', view .. 'u:' .. user, view .. 'x:' .. user)
    redis.call('SREM', view .. 'users', user)
    redis.call('SREM', view .. 'unknown', user)
  end
end

redis.call('ZADD', 'recsys:views', redis.call('TIME')[1], prefix)

for n = 6, #ARGV, 3 do
  local operation, user, data = ARGV[n], ARGV[n + 1], ARGV[n + 2]
  local key = prefix .. 'u:' .. user
  if operation == 'forget' or operation == 'hide' then
    redis.call('SADD', prefix .. 'forgotten', user)
    local heard = redis.call('SADD', 'recsys:tombstoned', data) == 1
    if redis.call('SADD', prefix .. 'applied', data) == 1 and operation == 'forget' then
      forget(user, heard)
    end
    -- Also of a log that is applied anew: the server may have lost the list before others had read it.
    if heard then
      redis.call('RPUSH', 'recsys:tombstones', data .. '\\0' .. user)
    end
  elseif operation == 'unknown' then
    redis.call('RPUSH', prefix .. 'x:' .. user, data)
    redis.call('SADD', prefix .. 'unknown', user)
  else
    local last = redis.call('GETRANGE', key, -size, -1)
    if last == '' or not later(last, 1, data, 1) then
      redis.call('APPEND', key, data)
    else
      redis.call('SET', key, merge(redis.call('GET', key), data))
    end
    redis.call('SADD', prefix .. 'users', user)
    local count = redis.call('STRLEN', key) / size
    -- What is above the bound is never read; it is taken out a little later, as that rewrites the whole value.
    if count > bound + math.floor(bound / 16) then
      local excess = (count - bound) * size
      drop_unknown(user, redis.call('GETRANGE', key, 0, excess - 1))
      redis.call('SET', key, redis.call('GETRANGE', key, excess, -1))
    end
  end
end
redis.call('HSET', prefix .. 'at', log, ARGV[4])
return 1
"""

LEARN = """
-- prefix, user, then (noted event, item key) each: gives events of unknown items the key that a bundle has for them.
local prefix, user, size = ARGV[1], ARGV[2], 13
local key, notes = prefix .. 'u:' .. user, prefix .. 'x:' .. user
local value = redis.call('GET', key) or ''
for n = 3, #ARGV, 2 do
  local record = string.sub(ARGV[n], 1, size)
  if redis.call('LREM', notes, 1, ARGV[n]) == 1 then
    local from = 1
    while true do
      local at = string.find(value, record, from, true)
      if not at then break end
      if (at - 1) % size == 0 then
        value = string.sub(value, 1, at + 7) .. ARGV[n + 1] .. string.sub(value, at + 12)
        break
      end
      from = at + 1
    end
  end
end
if value ~= '' then redis.call('SET', key, value) end
if redis.call('EXISTS', notes) == 0 then redis.call('SREM', prefix .. 'unknown', user) end
return 1
"""

COUNT_UNKNOWN = """
local count = 0
for _, user in ipairs(redis.call('SMEMBERS', ARGV[1] .. 'unknown')) do
  count = count + redis.call('LLEN', ARGV[1] .. 'x:' .. user)
end
return count
"""
