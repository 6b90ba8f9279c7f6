-- Takes from buckets as most of them are, by nothing but the numbers that this needs. The functions that follow are made anew at each
-- call, and tables for states and flows take as long as the sums. It decides about all flows of the call, or about none. Then it has
-- written nothing, and what follows decides about all of them.
--
-- A bucket is plain if it fills all the time, and was last used with the numbers of the call. A flow is plain if it asks of each key
-- once, and for tokens only. The sums are those of what follows, so that the answers are the same.

local plain = true

do
  local last, n, at = unpack('<dH', input)
  if last > 0 and now > last then plain, n = false, 0 end
  local rules = {false} -- with room for one: a table that grows takes time
  for i = 1, n do
    local flags, capacity, base, fill, interval, _
    flags, capacity, base, fill, interval, _, at = unpack('<Bddddd', input, at)
    if flags ~= BUCKET or base ~= capacity then
      plain = false
      break
    end
    rules[i] = {capacity, fill, interval, min(interval / 1000 / fill, CENTURY)}
  end
  local flows = 0
  if plain then flows, at = unpack('<H', input, at) end

  -- By the place of the key, for those that are read: what is there, since when, by which rule, the end of the epoch in which the bucket
  -- is full, and whether it has changed. The tables have room for all keys from the start. Places are in the order in which flows ask.
  local tokens, since, rule_of, epochs, changed = {all_of(KEYS)}, {all_of(KEYS)}, {all_of(KEYS)}, {all_of(KEYS)}, {all_of(KEYS)}
  local keys, asks, asked, wants = 0, {}, {}, {}
  local reply, replies = {pack('<d', now), all_of(KEYS)}, 1

  for flow = 1, flows do
    n, at = unpack('<H', input, at)
    local refused = false
    local key, rule, flags, want
    for ask = 1, n do
      key, rule, flags, want, at = unpack('<HHBd', input, at)
      local there
      rule = rules[rule]
      if key > keys then
        if key ~= keys + 1 then plain = false break end
        local capacity, value, seen, epoch = rule[1], values[key], now, 0
        there = capacity
        if value then
          if #value ~= 42 then plain = false break end
          local version, kind, of, fill, interval
          version, kind, there, seen, of, fill, interval = unpack('<BBddddd', value)
          if version ~= SCHEMA or kind ~= BUCKET or of ~= capacity or fill ~= rule[2] or interval ~= rule[3] then
            plain = false
            break
          end
          local over = seen + min((capacity - there) * rule[4], CENTURY)
          epoch = epoch_of(over)
          if now > seen then
            there, seen = there + fill * ((now - seen) * 1000) / interval, now
            if there > capacity then there = capacity end
          end
          if there < capacity and there >= capacity - SLACK then there = capacity end
        end
        keys = key
        tokens[key], since[key], rule_of[key], epochs[key], changed[key] = there, seen, rule, epoch, false
      else
        if rule_of[key] ~= rule then plain = false break end
        there = tokens[key]
      end
      if flags == 8 then
        at = at + 8 -- since when the numbers are in force, which does not matter to a bucket that has them
      elseif flags ~= 0 then
        plain = false
        break
      end
      if n > 1 then
        if asks[key] == flow then plain = false break end
        asks[key], asked[ask], wants[ask] = flow, key, want
      end
      if want ~= 0 and there - want < -SLACK then refused = true end
    end
    if not plain then break end
    for ask = 1, n do
      if n > 1 then key, want = asked[ask], wants[ask] end
      local there = tokens[key]
      replies = replies + 1
      if want == 0 or there - want >= -SLACK then
        if want ~= 0 and not refused then
          there = there - want
          if there < 0 then there = 0 end
          tokens[key], changed[key] = there, true
        end
        reply[replies] = pack('<Bd', 1, there)
      else
        local wait = -1
        rule = rule_of[key]
        if want <= rule[1] and rule[2] > 0 then
          wait = since[key] - now + min(ceil(ceil((want - there) / rule[2] * rule[3]) / 1000), CENTURY)
          if wait < 1 then wait = 1 end
        end
        reply[replies] = pack('<Bddddd', 32, there, wait, 0, 0, 0)
      end
    end
  end

  if plain then
    local before, text
    for key = 1, keys do
      if changed[key] then
        local rule = rule_of[key]
        local there, seen = tokens[key], since[key]
        local over = seen + min((rule[1] - there) * rule[4], CENTURY)
        if over < epochs[key] then
          -- The key has not expired since it was read, which would have SETRANGE make a key without a time to live.
          call('SETRANGE', KEYS[key], 2, pack('<dd', there, seen))
        else
          local value = pack('<BBddddd', SCHEMA, BUCKET, there, seen, rule[1], rule[2], rule[3])
          if rule[2] > 0 then
            local epoch = epoch_of(over)
            if epoch ~= before then before, text = epoch, time_to_live(epoch) end
            call('SET', KEYS[key], value, 'PX', text)
          else
            call('SET', KEYS[key], value)
          end
        end
      end
    end
    return table.concat(reply, '', 1, replies)
  end
end
