-- Has holders hold their slots for so long from now on at the least, or no longer if that is 0, and counts instances.
--
-- KEYS[1]: leases, or instances. ARGV[1]: holders. Reply: the time, and how many have not run out.

local n
n, at = unpack('<H', input, at)
for _ = 1, n do
  local holder, lasts
  holder, lasts, at = unpack('<c16d', input, at)
  local score = tonumber(call('ZSCORE', KEYS[1], holder) or 0)
  if lasts > 0 then
    -- An instance that a session has left does not shorten what another one says.
    if now + lasts > score then call('ZADD', KEYS[1], now + lasts, holder) end
  elseif score > now then
    -- It is remembered: keys look for leases that ended since they looked last.
    call('ZADD', KEYS[1], now + 1, holder)
  end
end
call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - RETAINED)
call('PEXPIRE', KEYS[1], 2 * RETAINED / 1000)
return pack('<dd', now, call('ZCOUNT', KEYS[1], string.format('(%.0f', now), '+inf'))
