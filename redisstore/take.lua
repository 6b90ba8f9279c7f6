-- Takes what flows want, one flow after the other: all that a flow wants, or nothing.
--
-- ARGV[1]: the last time that this call counts at (0: any), rules, then flows. Reply: the time, and for each ask its
-- flags (1 OK, 2 differs, 4 the periods do not reach the time, 8 a newer schema, 16 the call is late, 32 more follows), and
-- what is left. What may follow is how long to wait (-1: never), the period or how many hold slots, what was drawn ahead,
-- and how long until it may be used.

local last
last, at = unpack('<d', input, at)
local late = last > 0 and now > last
local rules = read_rules()
local flows
flows, at = unpack('<H', input, at)

local function judge(a, s, r)
  local tokens = a.tokens
  if r.kind == BUCKET then
    a.left = s.tokens
    a.ok = tokens == 0 or s.tokens - tokens >= -SLACK
    if not a.ok then
      a.wait = brings(r, tokens) and max(until_there(s, r, tokens), 1) or -1
    end
  elseif r.kind == QUOTA then
    a.left = s.tokens
    a.ok = tokens == 0 or s.tokens - tokens >= -SLACK
    if not a.ok then a.wait = wait_quota(s, r, tokens) end
  else
    a.left = r.capacity - s.used
    a.ok = tokens == 0 or a.left > SLACK or (s.count == 0 and r.capacity > 0)
    if not a.ok then
      if r.capacity <= 0 then
        a.wait = -1
      else
        local keys, soon = s.keys, huge
        local first = call('ZRANGE', keys.ends, 0, 0, 'WITHSCORES')
        if first[2] then soon = tonumber(first[2]) end
        local lapse = call('ZRANGEBYSCORE', keys.leases, string.format('(%.0f', now), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
        if lapse[2] then soon = min(soon, tonumber(lapse[2])) end
        a.wait = soon == huge and 0 or max(soon - now, 1)
      end
    end
  end
end

local reply, leased = {pack('<d', now)}, {}

local function take(a, s, r)
  local tokens = a.tokens
  if tokens == 0 then return end
  local there
  if r.kind == SLOTS then there = s.count == 0 or r.capacity - s.used > SLACK else there = s.tokens - tokens >= -SLACK end
  if not there then -- another ask of the flow has the same key
    judge(a, s, r)
    return
  end
  s.dirty = true
  if r.kind == SLOTS then
    tokens = min(tokens, MOST)
    s.used, s.count = s.used + tokens, s.count + 1
    local value = pack('<c16d', a.holder, tokens)
    s.adds[#s.adds + 1] = {id = a.id, value = value, over = now + r.interval}
    if not s.leased[a.holder] then
      s.leased[a.holder] = true
      leased[#leased + 1] = {leases = s.keys.leases, holder = a.holder, lasts = a.lasts}
    end
    a.left = r.capacity - s.used
  else
    s.tokens = max(s.tokens - tokens, 0)
    a.left = s.tokens
  end
end

-- draw takes tokens ahead: of those that are there or, if that is less than what may be reserved, of those that will come, too. It takes
-- none if they would not do for another flow like this one.
local function draw(a, s, r, taken)
  local tokens = taken and min(a.ahead, max(s.tokens, 0) / 2 / max(a.instances, 1)) or 0
  if a.reserve > tokens and r.fill > 0 then
    tokens = min(a.reserve, max(s.tokens + r.capacity / 2, tokens))
  end
  if tokens > 0 and tokens >= a.tokens then
    a.drawn, a.after = tokens, until_there(s, r, tokens)
    s.tokens, s.dirty = s.tokens - tokens, true
    a.left = s.tokens
  end
end

local function answer(flags, left, wait, period, drawn, after)
  if wait == 0 and period == 0 and drawn == 0 then
    reply[#reply + 1] = pack('<Bd', flags, left)
  else
    reply[#reply + 1] = pack('<Bddddd', flags + 32, left, wait, period, drawn, after)
  end
end

local pool = {} -- asks of the flow before

for _ = 1, flows do
  local n
  n, at = unpack('<H', input, at)
  local refused, void = 0, late
  for i = 1, n do
    local a = pool[i]
    if not a then
      a = {rule = false, tokens = 0, flags = 0, extra = false, state = false, ok = false, left = 0, wait = 0, drawn = 0, after = 0}
      pool[i] = a
    end
    local index, rule
    index, rule, a.flags, a.tokens, at = unpack('<HHBd', input, at)
    local r = rules[rule]
    a.rule, a.wait, a.drawn, a.after = r, 0, 0, 0
    local since = 0
    a.extra = a.flags % 8 >= 4
    if a.extra then
      a.ahead, a.reserve, a.owed, a.instances, at = unpack('<dddd', input, at)
    end
    if a.flags >= 8 then since, at = unpack('<d', input, at) end
    if r.kind == SLOTS then
      a.id, a.holder, a.lasts, at = unpack('<c8c16d', input, at)
    end
    if not late then
      local s = state(index, r, since)
      a.state = s
      if s.newer or s.again then void = true end
    end
  end
  if not void then
    for i = 1, n do
      local a = pool[i]
      local s = a.state
      if (s.differs or s.looked) and a.flags % 4 < 2 then s.dirty = true end
      if a.extra and a.owed > 0 and a.rule.kind ~= SLOTS then
        owe(s, a.owed, a.rule.lowest)
        s.dirty = true
      end
      judge(a, s, a.rule)
      if not a.ok and a.flags % 2 == 0 then refused = refused + 1 end
    end
  end
  for i = 1, n do
    local a = pool[i]
    local s, r = a.state, a.rule
    if void then
      answer(late and 16 or (s.again and 4 or 0) + (s.newer and 8 or 0), 0, 0, 0, 0, 0)
    else
      local taken = refused == 0 and a.ok and a.flags % 4 < 2
      if taken then take(a, s, r) end
      if a.extra and a.ahead + a.reserve > 0 and r.kind == BUCKET and (taken or not a.ok and refused <= 1) then draw(a, s, r, taken) end
      local period = r.kind == QUOTA and s.over or r.kind == SLOTS and s.count or 0
      answer((a.ok and 1 or 0) + (s.differs and 2 or 0), a.left, a.wait, period, a.drawn, a.after)
    end
  end
end

save_all()
for i = 1, #leased do
  lease(leased[i].leases, leased[i].holder, leased[i].lasts)
end
return table.concat(reply)
