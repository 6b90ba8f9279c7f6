-- Has holders hold their slots for so long from now on, and counts instances.
--
-- KEYS[1]: leases, or instances. ARGV[1]: holders. Reply: the time, and how many have not run out.

local n
n, at = unpack('<H', input, at)
for _ = 1, n do
  local holder, lasts
  holder, lasts, at = unpack('<c16d', input, at)
  -- A lease that has ended is remembered: keys look for those that ended since they looked last.
  call('ZADD', KEYS[1], string.format('%.0f', lasts > 0 and now + lasts or now + 1), holder)
end
call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - RETAINED))
call('PEXPIRE', KEYS[1], string.format('%.0f', 2 * RETAINED / 1000))
return pack('<dd', now, call('ZCOUNT', KEYS[1], string.format('(%.0f', now), '+inf'))
