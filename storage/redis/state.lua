-- What both scripts share: the arithmetic of internal/law, with the step numbers of its decide.go, and the stored form
-- of what an identifier has spent.
--
-- The value at a key consists of these fields. Integers are unsigned and little-endian; their bytes are in brackets.
--
--   't2'     marks a value of this package; 2 is the version of the form
--   flags    the number of buckets, plus 32 if the value is wide, plus 64 if the buckets changed at different times (1)
--   buckets  of each its head, and its number of holds (1; above 254 it is 255 and then the number in 2 more)
--   time     when all buckets were changed last (7). With flag 64 each bucket has its own time, before its holds
--   holds    of each its end (7) and its N (4, or 7 if wide), bucket by bucket
--
-- A head is a name, preceded by its length (1), and kind * 2^45 + period (6). A Continuous bucket adds its refill (7)
-- and tick (6). The heads of other kinds do not tell the capacity, because a change of capacity leaves their holds as
-- they are.
--
-- Rules are sent with heads in the same form, so a bucket is matched with its rule by comparing bytes.
--
-- In these scripts a state is a list: its law, the time of its last change (seen), then the end and N of each hold. A
-- rule is a law with a capacity C. The law of a state is the rule of its bucket, with one exception: a Continuous
-- state that was changed last under another refill keeps its old law until under() converts it. A Continuous state
-- has at most one hold: N is the level in units at the time of its last change, and the end is 0, or the time until
-- which a partial refund of a reservation excludes another one (giveBack in change.lua).
--
-- All numbers are integers of at most 2^53, which a Lua number holds exactly.
--
-- Fields of a law: k kind, P period, Q tick, G grain, one units in a token, fade how long after its end a hold is gone.
-- A Continuous law also has its refill in tokens a period, and R, the units that drain in a tick.

local char, sub, concat = string.char, string.sub, table.concat
local pack, unpack = struct.pack, struct.unpack
local floor, ceil, max, min, abs = math.floor, math.ceil, math.max, math.min, math.abs
local exact, far = 2 ^ 53, 2 ^ 50

-- Decodes the law at position p of v. Returns it and the position after it, and raises an error if it is invalid.
local function law(v, p)
  local name, P, q = unpack('<Bc0I6', v, p)
  local k, R, Q = floor(P / 2 ^ 45), 0, 1
  P = P % 2 ^ 45
  if k == 1 then R, Q, q = unpack('<I7I6', v, q) end
  if k > 4 or P < 1 or k == 1 and (R < 1 or Q < 1 or P % Q > 0) then error('not a law') end
  local l = { name = name, head = sub(v, p, q - 1), k = k, P = P, R = R, Q = Q, G = 1, one = 1, fade = k == 3 and P - 1 or 0 }
  if k == 1 then
    local a, b = P / Q, R
    while b > 0 do a, b = b, a % b end
    l.one, l.R, l.refill = P / Q / a, R / a, R
  end
  return l, q
end

-- Turns a law into the rule of a bucket with capacity C. At most M tokens are ever spent. Step is the tick of a
-- Continuous bucket or a SlidingWindow, and the grain of a log. Thin is the largest N of a hold that returns a grain
-- early.
local function rule(l, C, step)
  l.C, l.M = C, 4 * C
  if l.k == 1 then l.M = max(4 * C, min(4 * l.refill, floor((exact - 1) / l.one))) end
  if l.k == 3 then l.Q, l.one, l.fade = step, l.P / step, l.P - step end
  if l.k == 4 then l.G = step end
  l.thin = ceil(C / 256) + ceil(C / l.P)
end

-- Decodes a value. Returns the states at the indices of their rules, and a list of the states without a rule. It raises
-- an error if the value is not in the form above, or if the holds of a bucket have more tokens than an answer has room
-- for. They may have twice 2^53, because those of a SlidingWindow that fade count in part.
local function read(v, rules)
  if sub(v, 1, 2) ~= 't2' then error('foreign') end
  local flags, p = unpack('<B', v, 3)
  local laws, places, counts = {}, {}, {}
  for i = 1, flags % 32 do
    local r, at = rules[i], i
    if r and sub(v, p, p + #r.head - 1) == r.head then
      p = p + #r.head
    else
      r, p = law(v, p)
      at = nil
      for j = 1, #rules do
        local o = rules[j]
        if o.name == r.name and o.k == r.k and o.P == r.P then
          at = j
          if o.head == r.head then r = o end
        end
      end
    end
    laws[i], places[i] = r, at
    counts[i], p = unpack('<B', v, p)
    if counts[i] == 255 then counts[i], p = unpack('<I2', v, p) end
  end
  local states, others, hold, seen = {}, {}, flags % 64 >= 32 and '<I7I7' or '<I7I4', nil
  for i = 1, #laws do
    local last, all, at = 0, 0, places[i]
    if flags >= 64 or i == 1 then seen, p = unpack('<I7', v, p) end
    local s = { laws[i], seen }
    for h = 3, 2 * counts[i] + 2, 2 do
      local e, m
      e, m, p = unpack(hold, v, p)
      all = all + m
      if e < last or e > exact or m > exact or all > 2 * exact or m < 1 and s[1].k ~= 1 then error('not a hold') end
      s[h], s[h + 1], last = e, m, e
    end
    if seen > exact or s[1].k == 1 and counts[i] > 1 or at and states[at] then error('not a state') end
    if at then states[at] = s else others[#others + 1] = s end
  end
  if flags >= 128 or p ~= #v + 1 then error('not the end') end
  return states, others
end

-- n*a/b rounded down, and the remainder, for a and b up to 2^45. If n*a would not be exact it divides digit by digit in
-- base 128: rest < b, so rest * 128 and the product stay below 2^53.
local function scale(n, a, b)
  if n * a < exact then return floor(n * a / b), n * a % b end
  local q, rest = 0, 0
  for shift = 49, 0, -7 do
    rest = rest * 128 + floor(n / 2 ^ shift) % 128 * a
    q, rest = q * 128 + floor(rest / b), rest % b
  end
  return q, rest
end

-- Step 1: a state that is over a period and a minute ahead of the clock counts as empty.
local function believable(s, real) return s[2] <= real + s[1].P + 60000000 end

-- The units of a level that are left at a time t, by the refill of its law. After 2^50 µs, about 35 years, none are.
local function left(s, t)
  local l, n = s[1], s[4] or 0
  local dt = floor(t / l.Q) - floor(s[2] / l.Q)
  if dt < ceil(n / l.R) and dt < floor(far / l.Q) then return n - l.R * dt end
  return 0
end

-- The units of a level that are left now. A level that was empty under its former refill stays empty; see under.
local function drained(s, now)
  if s.full and s.full <= now then return 0 end
  return left(s, now)
end

-- The time at which a level will have fallen to the given units, at most 2^50 µs after its last change.
local function falls(s, units)
  local l = s[1]
  return (floor(s[2] / l.Q) + min(ceil(((s[4] or 0) - units) / l.R), floor(far / l.Q))) * l.Q
end

-- Converts a Continuous state to the units of a rule, rounded up. Full is the time at which the bucket was full under
-- its former law: it stays full from then on, because a key may have expired.
local function under(s, r)
  if not s or s[1] == r then return s end
  local n, one = s[4], s[1].one
  if n and one ~= r.one then
    local part, more = scale(n % one, r.one, one)
    if more > 0 then part = part + 1 end
    local whole = floor(n / one)
    if whole > floor((exact - 1 - part) / r.one) then n = exact - 1 else n = whole * r.one + part end
  end
  return { r, s[2], s[3], n, full = falls(s, 0) }
end

-- The time at which the tokens of a hold come back, at least `before`: that of the preceding hold. In a log with a
-- grain, a thin hold returns a grain early; internal/law/law.go says why.
local function returns(l, e, n, before)
  if l.G > 1 and e % l.G == 0 and n <= l.thin then return max(before, e - l.G) end
  return e
end

-- Step 3: the tokens that have not come back at now.
local function out(s, now)
  local l, u = s[1], 0
  if l.k == 1 then return ceil(drained(s, now) / l.one) end
  if l.k == 3 then
    local t = floor(now / l.Q) + 1
    for i = 3, #s, 2 do
      local left = floor((s[i] + l.P) / l.Q) - t
      if left >= l.one then
        u = u + s[i + 1]
      elseif left > 0 then
        u = u + scale(s[i + 1], left, l.one)
      end
    end
    return u
  end
  local at = 0
  for i = 3, #s, 2 do
    at = returns(l, s[i], s[i + 1], at)
    if at > now then u = u + s[i + 1] end
  end
  return u
end

-- The time at which the tokens spent, given for now, will have fallen to room.
local function back(s, now, room, spent)
  if spent <= room then return now end
  local l, left, at = s[1], 0, 0
  if l.k == 1 then return falls(s, room * l.one) end
  for i = 4, #s, 2 do left = left + s[i] end
  for i = 3, #s, 2 do
    local n = s[i + 1]
    at, left = returns(l, s[i], n, at), left - n
    if left <= room then
      if l.k == 3 then return s[i] + l.P - ceil((room - left + 1) * l.one / n) * l.Q end
      break
    end
  end
  return at
end

-- The time at which everything that is spent is gone, to the last unit.
local function gone(s)
  if #s < 3 then return s[2] end
  if s[1].k == 1 then return falls(s, 0) end
  return s[#s - 1] + s[1].fade
end

-- The end of the hold of a token taken now.
local function finish(l, now)
  if l.k == 2 or l.k == 3 then return now - now % l.P + l.P end
  if l.k == 4 then return ceil((now + l.P) / l.G) * l.G end
  return now + l.P
end

-- The state without the holds that are gone: a new list if there are any.
local function living(s, now)
  local l, i, n = s[1], 3, #s
  while i <= n and s[i] + l.fade <= now do i = i + 2 end
  if i == 3 then return s end
  local out = { l, s[2] }
  for j = i, n do out[j - i + 3] = s[j] end
  return out
end

-- The state prepared for a change under rule r, and the bucket's time: the real time, or seen if that is later.
-- Without a believable state it is an empty one.
local function open(s, r, real)
  if not s or not believable(s, real) then return { r, real }, real end
  local now = max(real, s[2])
  if r.k == 1 then
    local u = drained(under(s, r), now)
    if u == 0 then return { r, now }, now end
    return { r, now, s[3] > now and s[3] or 0, u }, now
  end
  s = living(s, now)
  s[2] = now
  return s, now
end

-- The time from which the bucket is full if nothing more is taken, at least real. A state that is ahead of the clock is
-- kept until the clock has reached it, even if it is empty.
local function fullAt(s, real)
  if not believable(s, real) then return real end
  local at = gone(s)
  if #s < 3 or at <= real then return max(real, s[2]) end
  return at
end

local function full(s, real) return fullAt(s, real) <= real end

-- Writes the states that are not full, or deletes the key if all are. The key outlives the last state by a second;
-- with a client's clock, which may stand still, by another hour. Returns the first byte of an answer. A state with
-- more holds than the form can count is an error, and nothing is written.
--
-- For states with a rule, whether the value is wide follows from the rule and not from the consumption: then its length
-- stays that of a plain value, which the fast way of decide.lua can read.
local function store(key, states, rules, others, real, clocked)
  local kept, flags, last = {}, 0, real
  local function keep(s)
    if not s or full(s, real) then return end
    local l = s[1]
    kept[#kept + 1] = s
    if (l.M or 0) * (l.k == 1 and l.one or 1) >= 2 ^ 32 then flags = 32 end
    for i = 4, #s, 2 do
      if s[i] >= 2 ^ 32 then flags = 32 end
    end
    last = max(last, fullAt(s, real))
  end
  for i = 1, #rules do keep(states[i]) end
  for i = 1, #others do keep(others[i]) end
  if #kept == 0 then
    redis.call('DEL', key)
    return char(1)
  end

  local heads, bodies, hold, shared = { 't2', '' }, {}, flags == 32 and '<I7I7' or '<I7I4', true
  for i = 1, #kept do
    if #kept[i] > 2 * 65535 then return char(5) end
    if kept[i][2] ~= kept[1][2] then shared = false end
  end
  if not shared then flags = flags + 64 end
  heads[2] = char(#kept + flags)
  for i = 1, #kept do
    local s = kept[i]
    local n = (#s - 2) / 2
    heads[#heads + 1] = s[1].head
    heads[#heads + 1] = n < 255 and char(n) or pack('<BI2', 255, n)
    if i == 1 or not shared then bodies[#bodies + 1] = pack('<I7', s[2]) end
    for h = 3, #s, 2 do bodies[#bodies + 1] = pack(hold, s[h], s[h + 1]) end
  end
  redis.call('SET', key, concat(heads) .. concat(bodies), 'PX', ceil((last - real) / 1000) + (clocked and 3601000 or 1000))
  return char(1)
end

-- The states and others of a key, as read returns them. If it fails it returns nil and the script's answer. The
-- number of buckets is bounded by 16 only if a time is given: buckets that are full at that time do not count.
local function load(key, rules, real)
  local v = redis.pcall('GET', key)
  if not v then return {}, {} end
  if type(v) == 'table' then
    if sub(v.err, 1, 9) == 'WRONGTYPE' then return nil, char(3) end
    -- Any other error ends the script: call raises what pcall returned.
    redis.call('GET', key)
  end
  local ok, states, others = pcall(read, v, rules)
  if not ok then return nil, char(2) end
  if not real then return states, others end
  local n = #rules
  for i = 1, #others do
    if not full(others[i], real) then n = n + 1 end
  end
  if n > 16 then return nil, char(4, n) end
  return states, others
end
