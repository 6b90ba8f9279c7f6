-- What the scripts have in common: the clock, the numbers that travel with a call, and the values of keys.
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

-- The values of buckets and quotas. Slots have none here.
local values = call('MGET', all_of(KEYS))

-- A key expires an epoch after the one in which its state is last needed. A change within that epoch leaves the expiry as it is, because
-- SET with a time to live takes the server longer than SETRANGE. Such a key lives for another epoch at least.
local EPOCH = 4e6

-- epoch_of returns the end of the epoch of a time.
local function epoch_of(over) return over - over % EPOCH + EPOCH end

local function time_to_live(epoch) return string.format('%.0f', ceil((epoch + EPOCH - now) / 1000)) end
