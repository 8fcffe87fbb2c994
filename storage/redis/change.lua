-- Changes: Charge, Refund, Raise, Reset and Debt, for any number of identifiers, one after another.
--
-- ARGV[1] has these fields for each key. Their bytes are in brackets.
--
--   what     0 apply amounts, 1 raise to debts, 2 reset, 3 return the debts; plus 4 if a time is sent (1)
--   number   of buckets (1)
--   time     in µs, if it is sent (7)
--   buckets  of each its law (see state.lua), capacity (7), step (6: the tick, or the grain of a log), number of
--            amounts (2), and of each amount its N and In (8 each, signed)
--
-- With 0 a bucket has one amount: a positive N is charged, a negative one refunded. A debt has any number of amounts.
--
-- The answer has one byte for each key: 1 if it is done, 5 if a bucket would have too many holds, otherwise as in
-- decide.lua. With 3 the byte 1 is followed by the number of amounts of each bucket (2), and of each amount its N and
-- In (7 each).

--#include state.lua

-- The units that are left of n tokens of a Continuous level if the last of them comes back in the given time.
local function leftOf(l, n, time)
  local all, ticks = n * l.one, ceil(time / l.Q)
  if ticks >= ceil(all / l.R) then return all end
  return ticks * l.R
end

-- The end of the hold for an amount from another store, whose clock may differ. For kinds whose holds end with a
-- window it is the nearest end of a window, for a log the next multiple of the grain, and for Replenish the end of
-- the last hold if that is less than half a period away.
local function received(s, now, time)
  local l, n = s[1], #s
  local e = now + time - l.fade
  if l.k == 2 or l.k == 3 then return floor(max(0, e + floor(l.P / 2)) / l.P) * l.P end
  if l.k == 4 then return ceil(e / l.G) * l.G end
  if n > 2 and abs(s[n - 1] - e) < ceil(l.P / 2) then return s[n - 1] end
  return e
end

-- Adds n units to a level.
local function level(s, n) s[3], s[4] = s[3] or 0, (s[4] or 0) + n end

-- Charges n tokens that come back in the given time, as far as the bucket may record them. Holds stay in the order of
-- their ends.
local function charge(s, r, n, time, real)
  local now
  s, now = open(s, r, real)
  n = min(n, r.M - out(s, now))
  if n <= 0 or time <= 0 then return s end
  if r.k == 1 then
    level(s, leftOf(r, n, time))
    return s
  end
  local e, i = received(s, now, time), 3
  if e + r.fade <= now then return s end
  while i < #s and s[i] < e do i = i + 2 end
  if s[i] == e then
    s[i + 1] = s[i + 1] + n
  else
    table.insert(s, i, n)
    table.insert(s, i, e)
  end
  return s
end

-- Refunds n tokens, the last of which would come back in the given time, to a level.
--
-- A reservation whose time has not come gives back less, by what was taken after it: those calls keep their times.
-- After such a partial refund the order of the remaining calls is unknown. So nothing more is given back before s[3],
-- when the last of them has had its turn.
local function giveBack(s, r, n, time, now)
  local u, back, ticks = drained(s, now), leftOf(r, n, time), ceil(time / r.Q)
  if ticks >= ceil(r.C * r.one / r.R) then -- its time has not come
    local after = max(0, u - r.R * ticks) -- what was taken later, or up to a tick's refill less
    if s[3] > now then
      back = 0
    elseif after > 0 then
      back = max(0, back - after - 2 * r.R)
      if back > 0 then s[3] = falls(s, r.C * r.one) end
    end
  end
  s[4] = s[4] - min(u, back)
end

-- Refunds n tokens that would come back in the given time. It takes them from the hold whose end is nearest, then
-- from the next nearest. A hold that is over half a period away (in a log, over P/256 and a grain later) belongs to
-- other calls: refunds do not take that long, and clocks do not differ that much. A Continuous bucket whose refill was
-- raised gets nothing, as it is not known when it was raised.
local function refund(s, r, n, time, real)
  if not s or time <= 0 then return s end
  local now = max(real, s[2])
  if r.k == 1 then
    if s[1].refill > r.refill then return s end
    s = under(s, r)
    if s[4] then giveBack(s, r, min(n, floor((exact - 1) / r.one)), time, now) end
    return s
  end
  s = living(s, now)
  local want, before = real + time - r.fade, ceil(r.P / 2)
  local after = r.k == 4 and ceil(r.P / 256) + r.G or before
  while n > 0 do
    local made
    for i = 3, #s, 2 do
      local d = s[i] - want
      if -d <= before and d <= after and (not made or abs(d) <= abs(s[made] - want)) then made = i end
    end
    if not made then return s end
    if n < s[made + 1] then
      s[made + 1] = s[made + 1] - n
      return s
    end
    n = n - s[made + 1]
    table.remove(s, made)
    table.remove(s, made)
  end
  return s
end

-- Raises holds to theirs: at each future time as much is spent as the larger of the two says, but at most `most` of
-- theirs. It walks the ends from the latest to the earliest. What is still spent just before an end is the sum of the
-- holds from there on, so the larger of the two sums, less what the result already has, becomes a new hold with that
-- end.
local function highest(s, theirs, most)
  table.sort(theirs, function(a, b) return a[1] < b[1] end)
  local i, j, held, ours, others, holds = #s - 1, #theirs, 0, 0, 0, {}
  while i >= 3 or j >= 1 do
    local e = max(i >= 3 and s[i] or 0, j >= 1 and theirs[j][1] or 0)
    while i >= 3 and s[i] == e do
      ours = ours + s[i + 1]
      i = i - 2
    end
    while j >= 1 and theirs[j][1] == e do
      others = min(most, others + theirs[j][2])
      j = j - 1
    end
    local n = max(ours, others) - held
    if n > 0 then
      holds[#holds + 1] = { e, n }
      held = held + n
    end
  end
  local raised = { s[1], s[2] }
  for h = #holds, 1, -1 do
    raised[#raised + 1] = holds[h][1]
    raised[#raised + 1] = holds[h][2]
  end
  return raised
end

-- Raises a state to at least a debt, a list of N and In. Raising twice is raising once.
local function raise(s, r, debt, real)
  local now
  s, now = open(s, r, real)
  local theirs = {}
  for i = 1, #debt, 2 do
    local n, time = min(debt[i], r.M), debt[i + 1]
    if n > 0 and time > 0 then
      if r.k == 1 then
        level(s, max(0, leftOf(r, n, time) - (s[4] or 0)))
      else
        local e = received(s, now, time)
        if e + r.fade > now then theirs[#theirs + 1] = { e, n } end
      end
    end
  end
  if #theirs > 0 then return highest(s, theirs, r.M) end
  return s
end

-- Encodes the debt of a bucket: the amounts that are spent, and in how many µs each is back.
local function curve(s, r, real)
  local now
  s, now = open(s, r, real)
  if r.k == 1 then
    local n = out(s, now)
    if n == 0 then return pack('<I2', 0) end
    return pack('<I2I7I7', 1, n, back(s, now, 0, n) - now)
  end
  local told = { pack('<I2', (#s - 2) / 2) }
  for i = 3, #s, 2 do told[#told + 1] = pack('<I7I7', s[i + 1], s[i] + r.fade - now) end
  return concat(told)
end

-- The server's time in µs, read once for all keys of the call.
local server
local function clock()
  if not server then
    local t = redis.call('TIME')
    server = t[1] * 1000000 + t[2]
  end
  return server
end

-- Removes a key, unless its value is not of this package. A damaged value that begins with 't2' is removed too.
local function reset(key)
  local v = redis.pcall('GET', key)
  if v and (type(v) == 'table' or sub(v, 1, 2) ~= 't2') then
    local _, fault = load(key, {}, 0)
    return fault
  end
  redis.call('DEL', key)
  return char(1)
end

-- The answer to Debt. It changes nothing, so the number of buckets is not bounded.
local function tell(key, rules, real)
  local states, fault = load(key, rules)
  if not states then return fault end
  local told = { char(1) }
  for j = 1, #rules do told[j + 1] = curve(states[j], rules[j], real) end
  return concat(told)
end

-- Charges, refunds or raises the buckets of a key. An amount of 0 and an empty debt leave a bucket alone.
local function change(key, what, rules, real, clocked)
  local states, others = load(key, rules, real)
  if not states then return others end
  for j = 1, #rules do
    local r = rules[j]
    if what == 1 and #r > 0 then
      states[j] = raise(states[j], r, r, real)
    elseif what == 0 and r[1] > 0 then
      states[j] = charge(states[j], r, r[1], r[2], real)
    elseif what == 0 and r[1] < 0 then
      states[j] = refund(states[j], r, -r[1], r[2], real)
    end
  end
  return store(key, states, rules, others, real, clocked)
end

local answers, arg, p = {}, ARGV[1], 1
for i = 1, #KEYS do
  local what, n, real
  what, n, p = unpack('<BB', arg, p)
  local clocked = what >= 4
  if clocked then
    real, p = unpack('<I7', arg, p)
  else
    real = clock()
  end
  local rules = {}
  for j = 1, n do
    local r, C, step, c
    r, p = law(arg, p)
    C, step, c, p = unpack('<I7I6I2', arg, p)
    rule(r, C, step)
    for a = 1, 2 * c, 2 do
      r[a], r[a + 1], p = unpack('<i8i8', arg, p)
    end
    rules[j] = r
  end
  what = what % 4
  if what == 2 then
    answers[i] = reset(KEYS[i])
  elseif what == 3 then
    answers[i] = tell(KEYS[i], rules, real)
  else
    answers[i] = change(KEYS[i], what, rules, real, clocked)
  end
end
return concat(answers)
