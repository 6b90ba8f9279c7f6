-- Slots: a hash of who holds which and how many tokens, and a sorted set of when they run out. The hash's field of the
-- empty name says how much is in use, and until when leases have been looked at.

local function forget_slot(s, key, id)
  local value = call('HGET', key, id)
  if not value or s.gone[id] then return end
  local _, tokens = unpack('<c16d', value)
  s.gone[id] = true
  s.goes[#s.goes + 1] = id
  s.used, s.count = s.used - tokens, s.count - 1
  if s.count == 0 then s.used = 0 end -- forget what fractions leave behind
end

load_slots = function(keys, r)
  local s = {
    rule = r, keys = keys, used = 0, count = 0, seen = now, expire = 0, gone = {}, goes = {}, adds = {}, leased = {},
    dirty = false, differs = false,
  }
  local key, ends, leases = keys.key, keys.ends, keys.leases
  local value, newer = fetch(42, 'HGET', key, '')
  if newer then return {newer = true} end
  if not value then return s end
  local limit
  limit, s.used, s.count, s.seen, s.expire = unpack('<ddddd', value, 3)
  s.differs = limit ~= r.capacity
  if call('ZCARD', ends) ~= s.count then -- some came back while the server had no memory to count them
    s.used, s.count = 0, 0
    local all = call('HGETALL', key)
    for i = 1, #all, 2 do
      if all[i] ~= '' then
        local _, tokens = unpack('<c16d', all[i + 1])
        s.used, s.count = s.used + tokens, s.count + 1
      end
    end
  end
  for _, id in ipairs(call('ZRANGEBYSCORE', ends, '-inf', now)) do
    forget_slot(s, key, id)
  end
  local lost, known = {}, now - s.seen < RETAINED
  if known then
    for _, holder in ipairs(call('ZRANGEBYSCORE', leases, string.format('(%.0f', s.seen), now)) do
      lost[holder] = true
    end
  end
  if not known or next(lost) then
    local all = call('HGETALL', key)
    for i = 1, #all, 2 do
      local id = all[i]
      if id ~= '' then
        local holder = unpack('<c16', all[i + 1])
        if not known and lost[holder] == nil then
          local score = call('ZSCORE', leases, holder)
          lost[holder] = not score or tonumber(score) <= now
        end
        if lost[holder] then forget_slot(s, key, id) end
      end
    end
    s.looked = true
  end
  s.seen = max(s.seen, now)
  if #s.goes > 0 then s.looked = true end
  return s
end

save_slots = function(s, r)
  local key, ends = s.keys.key, s.keys.ends
  if s.count == 0 then
    call('DEL', key, ends)
    return
  end
  local lasts = false
  for _, add in ipairs(s.adds) do
    if add.over > s.expire then s.expire, lasts = add.over + max(add.over - now, 4e6) / 4, true end
  end
  -- The first write is one that a server without memory refuses: then the script has changed nothing.
  call('HSET', key, '', pack('<BBddddd', SCHEMA, SLOTS, r.capacity, s.used, s.count, s.seen, s.expire))
  for _, add in ipairs(s.adds) do
    call('HSET', key, add.id, add.value)
    call('ZADD', ends, add.over, add.id)
  end
  for _, id in ipairs(s.goes) do
    call('HDEL', key, id)
    call('ZREM', ends, id)
  end
  if lasts then
    local at_ms = ceil(s.expire / 1000) + 1000
    call('PEXPIREAT', key, at_ms)
    call('PEXPIREAT', ends, at_ms)
  end
end

-- lease has a holder hold its slots for so long from now on, less a twelfth at the most: calls that take slots are many.
lease = function(leases, holder, lasts)
  local score = call('ZSCORE', leases, holder)
  if not score or tonumber(score) < now + lasts * 11 / 12 then
    call('ZADD', leases, now + lasts, holder)
    call('PEXPIREAT', leases, ceil((now + lasts + RETAINED) / 1000))
  end
end
