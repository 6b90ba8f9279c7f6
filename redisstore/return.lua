-- Gives back what flows have taken, or corrects it.
--
-- ARGV[1]: rules, then returns. Reply: the time, and for each return its flags (1 returned, 4 the periods do not reach
-- the time, 8 a newer schema), the cost that is beyond the largest debt, and how long a slot was held.

local rules = read_rules()
local returns
returns, at = unpack('<H', input, at)

-- Periods that do not reach the time do so for all returns of the call: it comes again as a whole, so nothing is done yet.
local again = false
for i = 1, #rules do
  local r = rules[i]
  if r.kind == QUOTA and (now < r.before or now >= r.later) then again = true end
end

local reply = {pack('<d', now)}

local function return_slot(keys, r, id)
  local meta, newer = fetch(42, 'HGET', keys.key, '')
  if newer then return 8, 0 end
  local value = call('HGET', keys.key, id)
  if not value then return 0, 0 end
  local over = call('ZSCORE', keys.ends, id)
  call('HDEL', keys.key, id)
  call('ZREM', keys.ends, id)
  if meta then
    local version, kind, limit, used, count, seen, expire = unpack('<BBddddd', meta)
    local _, tokens = unpack('<c16d', value)
    if count <= 1 then
      call('DEL', keys.key, keys.ends)
    else
      -- A server without memory refuses this. Then the next take counts anew.
      redis.pcall('HSET', keys.key, '', pack('<BBddddd', version, kind, limit, used - tokens, count - 1, seen, expire))
    end
  end
  over = tonumber(over or 0)
  if over <= now then return 0, 0 end
  return 1, max(now - (over - r.interval), 0)
end

for _ = 1, returns do
  local index, rule, flags, tokens, cost, period, id
  index, rule, flags, tokens, cost, period, id, at = unpack('<HHBdddc8', input, at)
  local r, unused = rules[rule], flags == 1
  local result, forgiven, held = 0, 0, 0
  if again then
    result = 4
  elseif r.kind == SLOTS then
    result, held = return_slot({key = KEYS[index], ends = KEYS[index + 1]}, r, id)
  else
    local s = state(index, r, 0)
    if s.newer then
      result = 8
    elseif unused or cost < tokens then
      local back = unused and tokens or tokens - cost
      if (r.kind == BUCKET or period == s.over) and back > 0 then
        local tokens = s.tokens + back
        s.excess = max(s.excess - max(tokens - r.capacity, 0), 0)
        s.tokens = min(tokens, r.capacity)
        s.dirty, result = true, 1
      end
    elseif cost > tokens then
      forgiven = owe(s, cost - tokens, r.lowest)
      s.dirty = true
    end
  end
  reply[#reply + 1] = pack('<Bdd', result, forgiven, held)
end

save_all()
return table.concat(reply)
