-- What the scripts have in common: the clock, the numbers that travel with a call, and the states that keys hold.
--
-- Numbers travel packed, as doubles, because the server cuts a script's numbers to integers. Times are microseconds of
-- the server's clock, since 1970. Intervals, and times that pass, are nanoseconds where buckets compute with them, as in
-- package engine/internal/bucket: the sums are the same.

local all_of = unpack
local call, pack, unpack = redis.call, struct.pack, struct.unpack
local floor, ceil, min, max, huge = math.floor, math.ceil, math.min, math.max, math.huge

local SCHEMA = 1 -- of the states; a reader does not write what is newer
local SLACK = 1e-9 -- of a token, lost by floating point
local CENTURY = 3153600000 * 1e6
local MOST = 1e9 -- what one flow counts for, of slots
local RETAINED = 3600 * 1e6 -- how long a lease that has run out is remembered
local BUCKET, QUOTA, SLOTS = 1, 2, 3

local time = call('TIME')
local now = time[1] * 1e6 + time[2]

local input, at = ARGV[1], 1

-- What is not understood is neither used nor overwritten: it counts as of a newer schema. So does what another program has
-- put there. It does not keep other flows of the call from their answers. A state of another kind is understood, since its
-- component has become another one: it counts as none.
local function foreign(value, size)
  return type(value) ~= 'string' or #value ~= size or value:byte(1) ~= SCHEMA
end

local function fetch(size, ...)
  local value = redis.pcall(...)
  if not value then return nil end
  if foreign(value, size) then return nil, true end
  return value
end

-- Rules: kind and flags, and numbers by kind.
local function read_rules()
  local n
  n, at = unpack('<H', input, at)
  local rules = {}
  for i = 1, n do
    local r = {}
    r.flags, r.capacity, r.fill, r.interval, r.lowest, at = unpack('<Bdddd', input, at)
    r.kind, r.step, r.delay = r.flags % 4, floor(r.flags / 4) % 2 == 1, floor(r.flags / 8) % 2 == 1
    if r.kind == QUOTA then
      r.before, r.begin, r.over, r.later, at = unpack('<dddd', input, at)
    end
    rules[i] = r
  end
  return rules
end

local function time_to_fill(r, tokens)
  if r.fill == 0 or tokens == 0 then return 0 end
  local fills = tokens / r.fill
  if r.step then fills = ceil(tokens / min(r.fill, r.capacity)) end
  return min(ceil(ceil(fills * r.interval) / 1000), CENTURY)
end

-- The values of buckets and quotas. Slots have none here.
local values = call('MGET', all_of(KEYS))

-- Buckets. s.excess is what a smaller capacity has forgiven: it is owed again where the capacity grows. Otherwise two
-- versions of a policy that take turns at a key would make tokens.

local function delay_fill(s, r)
  s.start = now + time_to_fill(r, r.capacity)
  s.last = s.start
  if r.step then s.last = s.last - r.interval / 1000 end
end

local function refill(s, r)
  if now > s.start and now > s.last then
    local elapsed = (now - s.last) * 1000
    if r.step then
      local steps = floor(elapsed / r.interval)
      s.tokens = s.tokens + steps * r.fill
      s.last = s.last + min(steps * r.interval / 1000, CENTURY)
    else
      s.tokens = s.tokens + r.fill * elapsed / r.interval
      s.last = now
    end
    if s.tokens > r.capacity then
      s.excess = max(s.excess - (s.tokens - r.capacity), 0)
      s.tokens = r.capacity
    end
  end
  if s.tokens >= r.capacity - SLACK then s.tokens = max(s.tokens, r.capacity) end
  if r.delay and s.tokens >= r.capacity then delay_fill(s, r) end
end

local function brings(r, tokens) return tokens <= r.capacity and r.fill > 0 end

-- until_there returns how long until so many tokens have come.
local function until_there(s, r, tokens)
  local missing = tokens - s.tokens
  if missing <= SLACK then return 0 end
  local debt = 0
  if r.step then
    missing = missing - SLACK / 2
    if s.tokens < 0 and r.fill > r.capacity then
      local steps = ceil(-s.tokens / r.fill)
      debt = min(steps * r.interval / 1000, CENTURY)
      missing = tokens - min(s.tokens + steps * r.fill, r.capacity) - SLACK / 2
    end
  end
  local wait = s.last - now + debt + time_to_fill(r, max(missing, 0))
  if now <= s.start then wait = max(wait, s.start - now + 1) end
  return wait
end

-- carry gives a state the balance of another capacity. What was used remains used, and a smaller capacity makes no debt.
local function carry(s, before, after)
  local used = after - (before - s.tokens)
  local balance = min(max(used, min(s.tokens, 0)), after)
  if balance > used then
    s.excess = s.excess + (balance - used)
  elseif balance > s.tokens then
    local paid = min(s.excess, balance - s.tokens)
    balance, s.excess = balance - paid, s.excess - paid
  end
  s.tokens = balance
end

-- owe takes a debt from a balance, down to the lowest, and returns the rest.
local function owe(s, debt, lowest)
  local left = s.tokens - debt
  local to = max(left, min(s.tokens, lowest))
  s.tokens = to
  return to - left
end

local function load_bucket(index, r)
  local value = values[index]
  local other = value and not foreign(value, 42) and value:byte(2) % 4 == QUOTA
  if not value or other then
    local s = {rule = r, index = index, tokens = r.capacity, excess = 0, last = now, start = -huge, dirty = false, differs = other}
    refill(s, r)
    return s
  end
  local size = #value
  if foreign(value, size == 58 and 58 or 42) then return {newer = true} end
  local _, flags, tokens, last, capacity, fill, interval = unpack('<BBddddd', value)
  local excess, start = 0, -huge
  if size == 58 then excess, start = unpack('<dd', value, 43) end
  local s = {rule = r, index = index, tokens = tokens, excess = excess, last = last, start = start, dirty = false, differs = false}
  if flags == r.flags and capacity == r.capacity and fill == r.fill and interval == r.interval then
    refill(s, r)
    return s
  end
  s.differs = true
  refill(s, {step = floor(flags / 4) % 2 == 1, delay = floor(flags / 8) % 2 == 1, capacity = capacity, fill = fill, interval = interval})
  carry(s, capacity, r.capacity)
  if r.delay and s.start > now then
    s.start = min(s.start, now + time_to_fill(r, r.capacity))
    s.last = s.start
    if r.step then s.last = s.last - r.interval / 1000 end
  elseif r.step and r.interval < interval then
    s.last = max(s.last, now)
  end
  refill(s, r)
  return s
end

-- store writes a string that nobody needs after so long. It lasts a second longer, and up to an eighth: then many keys of a
-- call have the same time, which is text once.
local times = {}

local function store(key, value, lasts)
  if lasts == huge then
    call('SET', key, value)
    return
  end
  local ms = ceil(min(max(lasts, 0), CENTURY) / 1000) + 1000
  local _, exponent = math.frexp(ms)
  local unit = 2 ^ (exponent - 4)
  ms = ceil(ms / unit) * unit
  local text = times[ms]
  if not text then
    text = string.format('%.0f', ms)
    times[ms] = text
  end
  call('SET', key, value, 'PX', text)
end

local function save_bucket(s, r)
  local lasts = huge
  if r.fill > 0 then
    lasts = max(s.last, s.start, now) - now + time_to_fill(r, max(r.capacity - s.tokens, 0) + s.excess)
  end
  local value = pack('<BBddddd', SCHEMA, r.flags, s.tokens, s.last, r.capacity, r.fill, r.interval)
  if s.excess > 0 or s.start > -huge then value = value .. pack('<dd', s.excess, s.start) end -- few have these
  store(KEYS[s.index], value, lasts)
end

-- Quotas. The periods around the time travel with the call. If the time is beyond them, the caller must come again.

local function load_quota(index, r)
  if now < r.before or now >= r.later then return {again = true} end
  local begin, over = r.begin, r.over
  if now < begin then
    begin, over = r.before, r.begin
  elseif now >= over then
    begin, over = r.over, r.later
  end
  local value = values[index]
  local s = {rule = r, index = index, tokens = r.capacity, excess = 0, begin = begin, over = over, dirty = false, differs = false}
  if not value then return s end
  if foreign(value, #value == 58 and 58 or 42) then return {newer = true} end
  if value:byte(2) % 4 ~= QUOTA then
    s.differs = true
    return s
  end
  local was = {}
  was.tokens, was.excess, was.begin, was.over, was.capacity = unpack('<ddddd', value, 3)
  if now >= was.over then
    if was.tokens < 0 then -- each period that has begun since then pays its amount
      local periods = 1
      if begin > was.over + 1 then
        local length = (r.later - r.before) / 3
        periods = max(floor((begin - was.over) / length + 0.5), 1) + 1
      end
      s.tokens = min(was.tokens + periods * r.capacity, r.capacity)
    end
    s.differs = was.capacity ~= r.capacity
    return s
  end
  s.tokens, s.excess = was.tokens, was.excess
  if was.capacity ~= r.capacity or (was.over ~= over and was.begin <= now) then
    s.differs = true
    carry(s, was.capacity, r.capacity)
  end
  if was.begin > now then -- this clock is behind the one that the state was written by
    s.begin, s.over = was.begin, was.over
  end
  return s
end

local function save_quota(s, r)
  local lasts = s.over - now
  if s.tokens < 0 then
    lasts = r.capacity > 0 and lasts + (1 - s.tokens / r.capacity) * 1.1 * (r.later - r.before) / 3 or huge
  end
  store(KEYS[s.index], pack('<BBddddd', SCHEMA, r.flags, s.tokens, s.excess, s.begin, s.over, r.capacity), lasts)
end

-- wait_quota returns how long until the tokens may be there, and -1 for never.
local function wait_quota(s, r, tokens)
  if tokens > r.capacity + SLACK or r.capacity == 0 then return -1 end
  local missing = tokens - r.capacity - min(s.tokens, 0) -- when the next period begins
  local periods = missing > SLACK and ceil((missing - SLACK) / r.capacity) or 0
  if periods == 1 and s.over == r.over then return r.later - now end
  return min(s.over - now + periods * (r.later - r.before) / 3, CENTURY)
end

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

local function load_slots(keys, r)
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

local function save_slots(s, r)
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

-- lease has a holder hold its slots for so long from now on, at the least.
local function lease(leases, holder, lasts)
  local score = call('ZSCORE', leases, holder)
  if not score or tonumber(score) < now + lasts * 2 / 3 then
    call('ZADD', leases, now + lasts, holder)
    call('PEXPIREAT', leases, ceil((now + lasts + RETAINED) / 1000))
  end
end

-- States of the keys of this call. Each is read once, and written once.
local states, order = {}, {}

local function save(s)
  s.dirty = false
  local r = s.rule
  if r.kind == BUCKET then
    save_bucket(s, r)
  elseif r.kind == QUOTA then
    save_quota(s, r)
  else
    save_slots(s, r)
  end
end

-- state returns the state of a key. KEYS has one name for a bucket or a quota, and two for slots. All slots of a call have
-- one set of leases, the last of KEYS.
local function state(index, r)
  local s = states[index]
  if s then
    if s.rule == r then return s end
    if s.dirty then save(s) end -- flows of one call have other numbers
    if r.kind ~= SLOTS then values[index] = call('GET', KEYS[index]) end
  else
    order[#order + 1] = index
  end
  if r.kind == BUCKET then
    s = load_bucket(index, r)
  elseif r.kind == QUOTA then
    s = load_quota(index, r)
  else
    s = load_slots({key = KEYS[index], ends = KEYS[index + 1], leases = KEYS[#KEYS]}, r)
  end
  s.rule = r
  states[index] = s
  return s
end

local function save_all()
  for i = 1, #order do
    local s = states[order[i]]
    if s.dirty then save(s) end
  end
end
