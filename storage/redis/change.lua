-- Changes: Charge, Refund, Raise, Reset and Debt, for any number of identifiers one after another.
--
-- ARGV[1] holds for each key what to do (1 byte: 0 amounts, 1 debts, 2 reset, 3 tell the
-- debts, with 4 if a time is sent), number of buckets (1), the time if sent (7), then for each bucket its law,
-- capacity (7), step (6: the tick, or of a log the grain), number of amounts (2) and of each its N and In (8 each, signed). One amount is charged, or given back if it is
-- negative; a debt has any number.
--
-- The answer is one byte for each key: 1 if done, 5 if a bucket would have too many holds, else as in decide.lua.
-- After the 1 of debts that are told come for each bucket the number of its amounts (2), and of each its N and
-- In (7 each).

--#include state.lua

-- How many units are left of n tokens of a Continuous level which are all back in a given time.
local function leftOf(l, n, time)
  local all, ticks = n * l.one, ceil(time / l.Q)
  if ticks >= ceil(all / l.R) then return all end
  return ticks * l.R
end

-- When the hold of an amount from another store ends.
local function received(s, now, time)
  local l, n = s[1], #s
  local e = now + time - l.fade
  if l.k == 2 or l.k == 3 then return floor(max(0, e + floor(l.P / 2)) / l.P) * l.P end
  if l.k == 4 then return ceil(e / l.G) * l.G end
  if n > 2 and abs(s[n - 1] - e) < ceil(l.P / 2) then return s[n - 1] end
  return e
end

local function level(s, n) s[3], s[4] = s[3] or 0, (s[4] or 0) + n end

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

-- Gives a level n tokens back that are all gone in a given time.
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
  local want, off = real + time - r.fade, ceil(r.P / 2)
  if r.k == 4 then off = ceil(r.P / 256) + r.G end
  while n > 0 and #s > 2 do
    local made = 3
    for i = 3, #s, 2 do
      if abs(s[i] - want) <= abs(s[made] - want) then made = i end
    end
    if abs(s[made] - want) > off then return s end
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

-- The pointwise maximum of two curves: walk the ends downwards, at each the larger of the two sums.
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

-- The curve of what is still held over the time to come.
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

-- The server's time.
local server
local function clock()
  if not server then
    local t = redis.call('TIME')
    server = t[1] * 1000000 + t[2]
  end
  return server
end

local function reset(key)
  local v = redis.pcall('GET', key)
  if v and (type(v) == 'table' or sub(v, 1, 2) ~= 't2') then
    local _, fault = load(key, {}, 0)
    return fault
  end
  redis.call('DEL', key)
  return char(1)
end

local function tell(key, rules, real)
  local states, fault = load(key, rules)
  if not states then return fault end
  local told = { char(1) }
  for j = 1, #rules do told[j + 1] = curve(states[j], rules[j], real) end
  return concat(told)
end

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
