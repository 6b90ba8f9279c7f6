-- Shares tokens and slots among flows that wait in several engines. The algorithm is that of package
-- internal/testing/ledger, which says what it does: a test compares the two, step by step.
--
-- KEYS: those of the bucket or the slots, then the ledger, and for slots the leases. ARGV[1]: the last time that this call
-- counts at (0: any), one rule, what the channels of instances begin with, what to do (1: draw, 2: return), and what that needs.
--
-- Reply to a draw: the time, flags (2 differs, 8 a newer schema, 16 the call is late), what is left, when the next turn is due (0: not
-- known, -1: never), and for each grant the workload's and the flow's place in the call, and its tokens. To a return: as
-- return.lua.

local TTL, EARLY = 1e6, 5e3 -- TTL is for calls that do not say another
local MAX_FLOWS, MAX_WORKLOADS, MAX_STEPS, MAX_LOOKS, LATE_CLOCK = 32, 64, 256, 8, 1e9
local OTHERS = ''
local KEPT = 60e6 -- how long a ledger is kept, if the tokens in its boxes come sooner

local last
last, at = unpack('<d', input, at)
local rule = read_rules()[1]
local channels, mode
channels, mode, at = unpack('<Hc0B', input, at)

local ledger_at = rule.kind == SLOTS and 3 or 2
local ledger_key = KEYS[ledger_at]

-- L is the ledger: c is the clock, w are the workloads (n name, w weight, s start, l lists), i the instances (id, x expires, d due, q
-- woken, b box). A list has the place of its instance's ID in o, m if there may be more, and f: numbers of flows and what they cost
-- each, by turns. A box has workloads and tokens, by turns.
local L = {c = 0, w = {}, i = {}}
local there, newer = false, false
if values[ledger_at] then
  there = true
  if values[ledger_at]:byte(1) ~= SCHEMA then newer = true else L = cmsgpack.unpack(values[ledger_at]:sub(2)) end
end

local woken = {}

local function total(box)
  local sum = 0
  for i = 2, #box, 2 do sum = sum + box[i] end
  return sum
end

local function instance_of(id)
  for _, i in ipairs(L.i) do
    if i.id == id then return i end
  end
end

local function waits(i)
  for _, w in ipairs(L.w) do
    for _, l in ipairs(w.l) do
      if l.o == i.id then return true end
    end
  end
  return false
end

local function leave(i)
  for _, w in ipairs(L.w) do
    for at = #w.l, 1, -1 do
      if w.l[at].o == i.id then table.remove(w.l, at) end
    end
  end
end

local function tidy()
  for at = #L.w, 1, -1 do
    if #L.w[at].l == 0 then table.remove(L.w, at) end
  end
  for at = #L.i, 1, -1 do
    if total(L.i[at].b) <= SLACK and not waits(L.i[at]) then table.remove(L.i, at) end
  end
  if #L.w == 0 then
    L.c = 0
  elseif L.c >= LATE_CLOCK then
    for _, w in ipairs(L.w) do w.s = w.s - L.c end
    L.c = 0
  end
end

-- What is handed out: tokens of a bucket, or slots, of which those in boxes are held too.
local s, held = nil, 0

local function take(cost)
  if rule.kind == BUCKET then
    if s.tokens - cost < -SLACK then return false end
    s.tokens, s.dirty = max(s.tokens - cost, 0), true
    return true
  end
  if rule.capacity - held > SLACK or (held <= SLACK and rule.capacity > 0) then
    held = held + cost
    return true
  end
  return false
end

local function never(cost)
  if rule.kind == BUCKET then return cost > rule.capacity + SLACK end
  return rule.capacity <= 0
end

local function back(tokens)
  if tokens <= SLACK then return end
  if rule.kind == BUCKET then
    local sum = s.tokens + tokens
    s.excess = max(s.excess - max(sum - rule.capacity, 0), 0)
    s.tokens, s.dirty = min(sum, rule.capacity), true
  else
    held = held - tokens
  end
end

local function until_due(tokens)
  if rule.kind ~= BUCKET then return 0 end
  return rule.fill > 0 and max(until_there(s, rule, tokens), 1) or -1
end

local function expire()
  for _, i in ipairs(L.i) do
    if i.x <= now then
      back(total(i.b))
      i.b = {}
      leave(i)
    end
  end
  tidy()
end

local function find(name)
  for _, w in ipairs(L.w) do
    if w.n == name then return w end
  end
  if #L.w >= MAX_WORKLOADS - 1 and name ~= OTHERS then return find(OTHERS) end
  local w = {n = name, w = 1, s = L.c, l = {}}
  L.w[#L.w + 1] = w
  return w
end

local function first(workloads)
  local best, finish
  for _, w in ipairs(workloads) do
    if #w.l > 0 then
      local f = w.s + w.l[1].f[2] / w.w
      if not best or f < finish then best, finish = w, f end
    end
  end
  return best, finish
end

-- drop takes the first flow off a list, and returns what is left of it.
local function drop(f)
  if f[1] > 1 then
    f[1] = f[1] - 1
  else
    table.remove(f, 1)
    table.remove(f, 1)
  end
  return f
end

local function wake(i)
  if not i.q and (i.d == 0 or i.d > now + EARLY) then
    i.q = true
    woken[#woken + 1] = i.id
  end
end

-- hand hands out what there is, to give for the caller.
local function hand(caller, give)
  while true do
    local w, finish = first(L.w)
    if not w then return end
    local l = w.l[1]
    local cost = l.f[2]
    if never(cost) then
      if l.o == caller then give(w, nil) end
    else
      if not take(cost) then return end
      w.s, L.c = finish, max(L.c, finish)
      if l.o == caller then
        give(w, cost)
      else
        local i = instance_of(l.o)
        local filled = false
        for at = 1, #i.b, 2 do
          if i.b[at] == w.n then i.b[at + 1], filled = i.b[at + 1] + cost, true end
        end
        if not filled then
          i.b[#i.b + 1] = w.n
          i.b[#i.b + 1] = cost
        end
        wake(i)
      end
    end
    table.remove(w.l, 1)
    if #drop(l.f) > 0 then w.l[#w.l + 1] = l end
  end
end

-- turn returns when something falls to the instance if nothing changes but the time.
local function turn(i)
  if not waits(i) then return 0 end
  local ahead = {}
  for at, w in ipairs(L.w) do
    local lists = {}
    for n, l in ipairs(w.l) do
      local f = {}
      for i, number in ipairs(l.f) do f[i] = number end
      lists[n] = {o = l.o, m = l.m, f = f}
    end
    ahead[at] = {w = w.w, s = w.s, l = lists}
  end
  local sum = 0
  for _ = 1, MAX_STEPS do
    local w, finish = first(ahead)
    local l = w.l[1]
    sum = sum + l.f[2]
    if l.o == i.id then break end
    w.s = finish
    table.remove(w.l, 1)
    if not (l.m and #l.f == 2 and l.f[1] == 1) then drop(l.f) end
    if #l.f > 0 then w.l[#w.l + 1] = l end
  end
  return until_due(sum)
end

local function look()
  local looks = MAX_LOOKS
  for _, i in ipairs(L.i) do
    if looks > 0 and not i.q and i.d > now + EARLY and waits(i) then
      looks = looks - 1
      if now + turn(i) < i.d - EARLY then wake(i) end
    end
  end
end

local function finish()
  if s.dirty then save(s) end
  if #L.i > 0 then
    store(ledger_key, string.char(SCHEMA) .. cmsgpack.pack(L), rule.kind == BUCKET and
      (rule.fill > 0 and max(time_to_fill(rule, rule.capacity), KEPT) or huge) or KEPT)
  elseif there then
    call('DEL', ledger_key)
  end
  for _, id in ipairs(woken) do
    call('PUBLISH', channels .. id, ledger_key)
  end
end

local function begin(since)
  s = state(1, rule, since)
  if s.newer or newer then return false end
  if s.differs or s.looked then s.dirty = true end
  held = s.used or 0
  if rule.kind == SLOTS then
    for _, i in ipairs(L.i) do held = held + total(i.b) end
  end
  return true
end

-- return_slot reports whether the slot was held, and for how long.
local function return_slot(id)
  if s.gone[id] or call('HEXISTS', KEYS[1], id) == 0 then return 0, 0 end
  local used, over = s.used, tonumber(call('ZSCORE', KEYS[2], id) or now)
  forget_slot(s, KEYS[1], id)
  s.dirty, held = true, held - (used - s.used)
  return 1, max(now - (over - rule.interval), 0)
end

if last > 0 and now > last then return pack('<dBdd', now, 16, 0, 0) end

if mode == 2 then
  local returns
  returns, at = unpack('<H', input, at)
  local reply = {pack('<d', now)}
  local ok = begin(0)
  for _ = 1, returns do
    local unused, tokens, cost, id
    unused, tokens, cost, id, at = unpack('<Bddc8', input, at)
    local result, forgiven, took = 0, 0, 0
    if not ok then
      result = 8
    elseif rule.kind == SLOTS then
      result, took = return_slot(id)
    elseif unused == 1 or cost < tokens then
      back(unused == 1 and tokens or tokens - cost)
      result = 1
    elseif cost > tokens then
      forgiven, s.dirty = owe(s, cost - tokens, rule.lowest), true
    end
    reply[#reply + 1] = pack('<Bdd', result, forgiven, took)
  end
  if ok then
    expire()
    hand()
    tidy()
    finish()
  end
  return table.concat(reply)
end

local id, ttl, once, owed, since
id, ttl, once, owed, since, at = unpack('<c16dBdd', input, at)
if not begin(since) then return pack('<dBdd', now, 8, 0, 0) end

if ttl == 0 then ttl = TTL end
if owed > 0 and rule.kind == BUCKET then
  owe(s, owed, rule.lowest)
  s.dirty = true
end
local n
n, at = unpack('<H', input, at)
for _ = 1, n do
  local tokens, slot
  tokens, slot, at = unpack('<dc8', input, at)
  if rule.kind == SLOTS then return_slot(slot) else back(tokens) end
end
local holders = {} -- sessions and instances, and how long their leases are to last from now on
n, at = unpack('<H', input, at)
for i = 1, n do
  local h = {}
  h.id, h.lasts, at = unpack('<c16d', input, at)
  holders[i] = h
end

expire()
local caller = instance_of(id)
if not caller then
  caller = {id = id, b = {}}
  L.i[#L.i + 1] = caller
end
local had, box = waits(caller), caller.b
caller.x, caller.d, caller.q, caller.b = now + ttl, 0, false, {}

local grants, leased = {}, {}

-- give gives a flow of the caller what it costs.
local function give(f)
  grants[#grants + 1] = pack('<HBd', f.w, f.at, f.cost)
  if rule.kind == SLOTS then
    local cost = min(f.cost, MOST)
    local holder = holders[f.holder]
    s.used, s.count, s.dirty = s.used + cost, s.count + 1, true
    s.adds[#s.adds + 1] = {id = f.slot, value = pack('<c16d', holder.id, cost), over = now + rule.interval}
    leased[holder] = true
  end
end

-- spend gives the first of the flows what lay in the box for the workload.
local function spend(name, flows)
  for b = 1, #box, 2 do
    if box[b] == name then
      while #flows > 0 and box[b + 1] >= flows[1].cost - SLACK do
        box[b + 1] = max(box[b + 1] - flows[1].cost, 0)
        give(table.remove(flows, 1))
      end
    end
  end
  return flows
end

local waiting = {}
n, at = unpack('<H', input, at)
for i = 1, n do
  local w = {flows = {}}
  local size, flows
  w.weight, size, at = unpack('<dB', input, at)
  w.name, at = input:sub(at, at + size - 1), at + size
  flows, at = unpack('<B', input, at)
  w.all = flows
  for f = 1, flows do
    local flow = {w = i, at = f}
    flow.cost, at = unpack('<d', input, at)
    if rule.kind == SLOTS then flow.slot, flow.holder, at = unpack('<c8H', input, at) end
    w.flows[f] = flow
  end
  spend(w.name, w.flows)
  waiting[i] = w
end

-- What waits at the caller, by the name that it is listed under.
local listed, more = {}, {}
for _, w in ipairs(waiting) do
  if #w.flows > 0 then
    w.listed = find(w.name)
    w.listed.w = w.weight
  end
end
for f = 1, MAX_FLOWS do
  for _, w in ipairs(waiting) do
    if w.flows[f] then
      local name = w.listed.n
      local flows = listed[name] or {}
      listed[name] = flows
      if w.all >= MAX_FLOWS or #flows >= MAX_FLOWS then more[name] = true end
      if #flows < MAX_FLOWS then flows[#flows + 1] = w.flows[f] end
    end
  end
end
for _, w in ipairs(L.w) do
  local flows = listed[w.n]
  if flows and w.n == OTHERS then spend(OTHERS, flows) end
  local place
  for at, l in ipairs(w.l) do
    if l.o == id then place = at end
  end
  if flows and #flows > 0 then
    local f = {}
    for _, flow in ipairs(flows) do
      if f[#f] == flow.cost then
        f[#f - 1] = f[#f - 1] + 1
      else
        f[#f + 1] = 1
        f[#f + 1] = flow.cost
      end
    end
    local l = {o = id, m = more[w.n], f = f}
    if place then w.l[place] = l else w.l[#w.l + 1] = l end
  elseif place then
    table.remove(w.l, place)
  end
end

back(total(box))
hand(id, function(w, cost)
  local f = table.remove(listed[w.n], 1)
  if cost then give(f) end
end)
local next_turn = turn(caller)
if next_turn > 0 then caller.d = now + next_turn end
if once == 1 then leave(caller) end
tidy()
if had and not waits(caller) then look() end
finish()
for holder in pairs(leased) do
  if holder.lasts > 0 then lease(KEYS[4], holder.id, holder.lasts) end
end
return pack('<dBdd', now, s.differs and 2 or 0, rule.kind == BUCKET and s.tokens or rule.capacity - held, next_turn) ..
  table.concat(grants)
