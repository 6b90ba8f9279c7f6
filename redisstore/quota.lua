-- Quotas. The periods around the time travel with the call. If the time is beyond them, the caller must come again.

load_quota = function(index, r)
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
  if foreign(value, (#value == 66 or #value == 50) and #value or 42) then return {newer = true} end
  if value:byte(2) % 4 ~= QUOTA then
    s.differs = true
    return s
  end
  local was = {}
  was.tokens, was.excess, was.begin, was.over, was.capacity = unpack('<ddddd', value, 3)
  was.base = #value == 50 and unpack('<d', value, 43) or was.capacity
  if now >= was.over then
    if was.tokens < 0 then -- each period that has begun since then pays its amount
      local periods = 1
      if begin > was.over + 1 then
        local length = (r.later - r.before) / 3
        periods = max(floor((begin - was.over) / length + 0.5), 1) + 1
      end
      s.tokens = min(was.tokens + periods * r.capacity, r.capacity)
    end
    s.differs = was.capacity ~= r.capacity or was.base ~= r.base
    return s
  end
  s.tokens, s.excess = was.tokens, was.excess
  if was.capacity ~= r.capacity or was.base ~= r.base or (was.over ~= over and was.begin <= now) then
    s.differs = true
    carry(s, was.base, r)
  end
  if was.begin > now then -- this clock is behind the one that the state was written by
    s.begin, s.over = was.begin, was.over
  end
  return s
end

save_quota = function(s, r)
  local lasts = s.over - now
  if s.tokens < 0 then
    lasts = r.capacity > 0 and lasts + (1 - s.tokens / r.capacity) * 1.1 * (r.later - r.before) / 3 or huge
  end
  local value = pack('<BBddddd', SCHEMA, r.flags, s.tokens, s.excess, s.begin, s.over, r.capacity)
  if r.base ~= r.capacity then value = value .. pack('<d', r.base) end
  store(KEYS[s.index], value, lasts)
end

-- wait_quota returns how long until the tokens may be there, and -1 for never.
wait_quota = function(s, r, tokens)
  if tokens > r.capacity + SLACK or r.capacity == 0 then return -1 end
  local missing = tokens - r.capacity - min(s.tokens, 0) -- when the next period begins
  local periods = missing > SLACK and ceil((missing - SLACK) / r.capacity) or 0
  if periods == 1 and s.over == r.over then return r.later - now end
  return min(s.over - now + periods * (r.later - r.before) / 3, CENTURY)
end
