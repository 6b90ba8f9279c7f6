-- The rules that travel with a call, and the states that keys hold.

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

-- Rules: kind and flags, and numbers by kind. The fields are there from the start, since a table that grows takes time.
local function read_rules()
  local n
  n, at = unpack('<H', input, at)
  local rules = {}
  for i = 1, n do
    local flags, capacity, base, fill, interval, lowest
    flags, capacity, base, fill, interval, lowest, at = unpack('<Bddddd', input, at)
    local r = {
      flags = flags, kind = flags % 4, step = flags % 8 >= 4, delay = flags >= 8,
      capacity = capacity, base = base, fill = fill, interval = interval, lowest = lowest,
    }
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

-- What calls about buckets only do without: see quota.lua and slots.lua.
local load_quota, save_quota, wait_quota, load_slots, save_slots, lease

-- Buckets. s.excess is what a smaller capacity has forgiven: it is owed again where the capacity grows. Otherwise two
-- versions of a policy that take turns at a key would make tokens.

-- refill brings a bucket up to now, or to a time before.
local function refill(s, r, to)
  local now = to or now
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
  if r.delay and s.tokens >= r.capacity then
    s.start = now + time_to_fill(r, r.capacity)
    s.last = s.start
    if r.step then s.last = s.last - r.interval / 1000 end
  end
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

-- carry gives a state the balance of other numbers. What was used remains used, and a smaller capacity makes no debt. Where
-- the numbers change for a time only, what is used is counted from the capacity of the other times, the base: the balance
-- stays, as far as there is room.
local function carry(s, before, r)
  local used = r.base - (before - s.tokens)
  local balance = max(used, min(s.tokens, 0))
  if balance > used then
    s.excess = s.excess + (balance - used)
  elseif balance > s.tokens then
    local paid = min(s.excess, balance - s.tokens)
    balance, s.excess = balance - paid, s.excess - paid
  end
  s.tokens = min(balance, r.capacity)
end

-- owe takes a debt from a balance, down to the lowest, and returns the rest.
local function owe(s, debt, lowest)
  local left = s.tokens - debt
  local to = max(left, min(s.tokens, lowest))
  s.tokens = to
  return to - left
end

-- load_bucket reads a bucket, and brings it up to now. If it was last used with other numbers, it goes by those until the
-- ones of the rule came into force, which is so long ago.
local function load_bucket(index, r, since)
  local value = values[index]
  local other = value and not foreign(value, #value == 50 and 50 or 42) and value:byte(2) % 4 == QUOTA
  if not value or other then
    local s = {rule = r, index = index, tokens = r.capacity, excess = 0, last = now, start = -huge, dirty = false, differs = other}
    refill(s, r)
    return s
  end
  local size = #value
  if foreign(value, size == 66 and 66 or 42) then return {newer = true} end
  local _, flags, tokens, last, capacity, fill, interval = unpack('<BBddddd', value)
  local excess, start, base = 0, -huge, capacity
  if size == 66 then excess, start, base = unpack('<ddd', value, 43) end
  local s = {rule = r, index = index, tokens = tokens, excess = excess, last = last, start = start, dirty = false, differs = false}
  if flags == r.flags and capacity == r.capacity and base == r.base and fill == r.fill and interval == r.interval then
    refill(s, r)
    return s
  end
  s.differs = true
  local changed = max(now - (since or 0), min(last, now))
  refill(s, {step = flags % 8 >= 4, delay = flags >= 8, capacity = capacity, fill = fill, interval = interval}, changed)
  carry(s, base, r)
  if r.delay and s.start > changed then
    s.start = min(s.start, changed + time_to_fill(r, r.capacity))
    s.last = s.start
    if r.step then s.last = s.last - r.interval / 1000 end
  elseif r.step and r.interval < interval then
    s.last = max(s.last, changed)
  end
  refill(s, r)
  return s
end

-- store writes a string that nobody needs after so long.
local times = {} -- to live, by epoch

local function store(key, value, lasts)
  if lasts == huge then
    call('SET', key, value)
    return
  end
  local epoch = epoch_of(now + min(max(lasts, 0), CENTURY))
  local text = times[epoch]
  if not text then
    text = time_to_live(epoch)
    times[epoch] = text
  end
  call('SET', key, value, 'PX', text)
end

local function save_bucket(s, r)
  local lasts = huge
  if r.fill > 0 then
    lasts = max(s.last, s.start, now) - now + time_to_fill(r, max(r.capacity - s.tokens, 0) + s.excess)
  end
  local value = pack('<BBddddd', SCHEMA, r.flags, s.tokens, s.last, r.capacity, r.fill, r.interval)
  if s.excess > 0 or s.start > -huge or r.base ~= r.capacity then -- few have these
    value = value .. pack('<ddd', s.excess, s.start, r.base)
  end
  store(KEYS[s.index], value, lasts)
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
local function state(index, r, since)
  local s = states[index]
  if s then
    if s.rule == r then return s end
    if s.dirty then save(s) end -- flows of one call have other numbers
    if r.kind ~= SLOTS then values[index] = call('GET', KEYS[index]) end
  else
    order[#order + 1] = index
  end
  if r.kind == BUCKET then
    s = load_bucket(index, r, since)
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
