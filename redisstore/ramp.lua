-- Moves a ramp, unless it has moved meanwhile, and says where it stands.
--
-- KEYS[1]: the ramp. ARGV[1]: whether to move, the version that it moves from, and where to. Reply: flags (8: a newer
-- schema), and the position.

local move, from, to, direction, left
move, from, to, direction, left, at = unpack('<BddbB', input, at)
local value = values[1]
if value and foreign(value, 27) then return pack('<BddbB', 8, 0, 0, 0, 0) end
local version, position, since, heading, has_left = 0, 0, now, 0, 0
if value then
  version, position, since, heading, has_left = unpack('<dddbB', value, 2)
  now = max(now, since)
end
if move == 1 and version == from then
  version, position, since, heading, has_left = version + 1, to, now, direction, left
  call('SET', KEYS[1], pack('<BdddbB', SCHEMA, version, position, since, heading, has_left))
end
return pack('<BddbB', 0, version, max(position + heading * (now - since) * 1000, 0), heading, has_left)
