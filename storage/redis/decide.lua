-- Decisions: Take, Peek and Force, for any number of requests one after another.
--
-- KEYS has the keys of the requests' parts. ARGV[1] is empty, or has the number of its shape for each key (2). After
-- it come the shapes: the different parts of the requests, without their identifiers. A shape is
--
--   prefix   the beginning of a value in which these buckets have one hold each, changed at one time
--   form     all of such a value, for struct.unpack, and its size
--   mode     and flags: 1 if the next part belongs to the same request, 2 if states are doubted, 4 if less may be taken
--   time     in µs, or -1 for the server's
--   within   in µs, of a reservation
--   young    if states are doubted, how long ago in µs one was changed that is not
--   buckets  how many, and of each kind, period, units that drain a tick, tick, grain, units a token, capacity and cost
--
-- The answer begins with the server's time (7), 0 if no shape asks for it. Of each request the first byte is
--
--   0 denied, 1 admitted: then of each bucket what is spent, also what Force did not record, when it is full, when one
--     token more is there, when it has the cost, when all of it is gone if admitted, and what was taken (7 each)
--   7 denied, 8 admitted: then of each part the value that was there, or a zero byte. The client computes the rest
--   2 a value is none of ours, 3 it is no string
--   4 there are too many buckets: their number and that of the part after it (1 each)
--   6 it would be admitted, and a state that it takes from, or only looks at, is doubted or not there
--
-- There are two ways. The fast one is for nearly all requests: of each part the value is absent, or has one hold for
-- each of the buckets and nothing else, before and after. All parts are judged, and then all are written. The full one
-- is for any request. Its functions are made when the first request needs them, as this costs as much as a decision.
--
-- The numbers at the ends of lines are the steps of internal/law/decide.go.

local REPLENISH, CONTINUOUS, FIXED, SLIDING, LOG = 0, 1, 2, 3, 4
local TAKE, PEEK, FORCE = 0, 1, 2

local byte, concat, list, pack, unpack = string.byte, table.concat, unpack, struct.pack, struct.unpack
local ceil, floor, max, min, call, try = math.ceil, math.floor, math.max, math.min, redis.call, redis.pcall

local time
local function server()
  if not time then
    local t = call('TIME')
    time = t[1] * 1000000 + t[2]
  end
  return time
end

-- The fast way: one part. It returns the value that was there, whether the part is admitted, and if so the new value
-- and its time to live in ms, 0 to keep the one it has; or nothing if it cannot tell. Of a bucket m units are out until
-- e. Of an admitted one gone is when none is left, and the value lives until the last of them.
--
-- A level that has drained is below zero, as the product is rounded only where it is larger than any level. To have
-- room for the cost in units is to have room in tokens, as both are whole. What a SlidingWindow fades is left to the
-- full way: its hold either ends with the present window, and counts in full, or is gone.
local function fast(key, s)
  local v, now, held = try('GET', key), s[$now], nil
  if v then
    if #v ~= s[$size] then return end
    held = { unpack(s[$form], v) }
    if held[1] ~= s[$prefix] or held[2] > now then return end -- 1, 2
  else
    held = { s[$prefix], now }
  end
  local allowed, before, till, h = true, 0, 0, 3
  if s[$doubted] and (not v or held[2] <= s[$doubted]) then return end
  for _, b in ipairs(s[$buckets]) do
    local e, m, gone = 0, 0, 0
    if v then
      e, m = held[h], held[h + 1]
      if m > b[$most] or e > b[$latest] or m < 1 then return end
    end
    if b[$drain] > 0 then -- 3
      local seen = held[2]
      if now - seen > 2 ^ 49 then return end
      m = m - b[$drain] * (b[$ticks] - (seen - seen % b[$tick]) / b[$tick])
      if m < 0 then m = 0 end
      gone = (b[$ticks] + ceil((m + b[$take]) / b[$drain])) * b[$tick]
    else
      gone = e + b[$fade]
      if gone <= now then
        e, m = b[$finish], 0
        gone = e + b[$fade]
      elseif e < b[$join] then
        return
      elseif gone > before then
        before = gone
      end
    end
    if gone > till then till = gone end
    if m > b[$room] then allowed = false end -- 4
    m = m + b[$take] -- 5
    if m > b[$most] then return end
    held[h], held[h + 1] = e, m
    h = h + 2
  end
  if not allowed then return v or '\0', false end
  held[2] = now
  if till > before or not s[$served] then return v or '\0', true, pack(s[$form], list(held)), ceil((till - now) / 1000) + s[$grace] end
  return v or '\0', true, pack(s[$form], list(held)), 0
end

-- The same for one and for two buckets that come back at once, and the server's time: without a table for the holds,
-- which takes a sixth of the time. The second bucket has k units out until f.
local function one(key, s)
  local v, now, b = try('GET', key), s[$now], s[$buckets][1]
  local before, e, m = 0, 0, 0
  if v then
    if #v ~= s[$size] then return end
    local prefix, seen
    prefix, seen, e, m = unpack(s[$form], v)
    if prefix ~= s[$prefix] or seen > now or m > b[$most] or m < 1 or e > b[$latest] then return end -- 1, 2
    before = e
  end
  if e <= now then e, m = b[$finish], 0 elseif e < b[$join] then return end -- 3
  if m > b[$room] then return v or '\0', false end -- 4
  m = m + b[$take] -- 5
  if m > b[$most] then return end
  if e <= before then return v, true, pack(s[$form], s[$prefix], now, e, m), 0 end
  return v or '\0', true, pack(s[$form], s[$prefix], now, e, m), ceil((e - now) / 1000) + 1000
end

local function two(key, s)
  local v, now, b, c = try('GET', key), s[$now], s[$buckets][1], s[$buckets][2]
  local before, e, m, f, k = 0, 0, 0, 0, 0
  if v then
    if #v ~= s[$size] then return end
    local prefix, seen
    prefix, seen, e, m, f, k = unpack(s[$form], v)
    if prefix ~= s[$prefix] or seen > now or m > b[$most] or m < 1 or e > b[$latest] or k > c[$most] or k < 1 or f > c[$latest] then return end -- 1, 2
    before = e > f and e or f
  end
  if e <= now then e, m = b[$finish], 0 elseif e < b[$join] then return end -- 3
  if f <= now then f, k = c[$finish], 0 elseif f < c[$join] then return end
  if m > b[$room] or k > c[$room] then return v or '\0', false end -- 4
  m, k = m + b[$take], k + c[$take] -- 5
  if m > b[$most] or k > c[$most] then return end
  local new, till = pack(s[$form], s[$prefix], now, e, m, f, k), e > f and e or f
  if till <= before then return v, true, new, 0 end
  return v or '\0', true, new, ceil((till - now) / 1000) + 1000
end

-- Shapes and their buckets are lists, which are made faster than tables with names. So $form is a place in them,
-- which is put in where comments are left out:
--#slots prefix form size mode now grace served more doubted rules buckets way within less
--#slots kind tick grain capacity cost take most room finish join latest fade drain ticks

-- A bucket of a shape, with what the fast way needs to know. It counts in units: of take more of them at most room may be
-- out before, and at most most ever. A reservation has the room that there will be when its time within is over. A new
-- hold ends at finish; one is joined that ends at join or later, and none ends after latest.
local function bucket(mode, now, within, kind, period, drain, tick, grain, one, capacity, cost)
  local unit, finish, join, latest, fade, ticks, most, ahead = 1, 0, 0, now + period, 0, 0, 4 * capacity, 0
  if kind == CONTINUOUS then
    unit, latest, ticks = one, 0, (now - now % tick) / tick
    most = max(most, min(4 * drain * (period / tick) / one, floor((2 ^ 53 - 1) / one)))
    ahead = drain * (floor((now + within) / tick) - ticks)
  elseif kind == REPLENISH then
    finish = latest
  else
    finish = kind == LOG and latest or now - now % period + period
    join, fade = finish, kind == SLIDING and period - tick or 0
  end
  most = most * unit
  local room = min((capacity - cost) * unit + ahead, most - cost * unit)
  if mode == FORCE or cost == 0 then room = most end
  return { kind, tick, grain, capacity, cost, cost * unit, most, room, finish, join, latest, fade, drain, ticks }
end

-- How a part of a shape is decided.
local function wayOf(mode, less, plain, buckets)
  if less then return nil end
  for _, b in ipairs(buckets) do
    if b[$cost] == 0 and mode ~= PEEK or b[$grain] > 1 then return nil end
    if b[$kind] == CONTINUOUS or b[$kind] == SLIDING then plain = false end
  end
  if plain and #buckets == 1 then return one end
  if plain and #buckets == 2 then return two end
  return fast
end

local function shapeOf(arg)
  local prefix, form, size, mode, flags, now, within, young, n, p = unpack('<I2c0Bc0I2BBdddB', arg)
  local served, grace = now < 0, 3601000
  if served then now, grace = server(), 1000 end
  local buckets = {}
  for j = 1, n do
    local kind, period, drain, tick, grain, unit, capacity, cost, after = unpack('<Bddddddd', arg, p)
    buckets[j], p = bucket(mode, now, within, kind, period, drain, tick, grain, unit, capacity, cost), after
  end
  local doubted, less = flags % 4 > 1, flags > 3
  local way = wayOf(mode, less, served and not doubted, buckets)
  return { prefix, form, size, mode, now, grace, served, flags % 2 == 1, doubted and now - young, false, buckets, way, within, less }
end

local index, shapes = ARGV[1], {}
for i = 2, #ARGV do shapes[i - 1] = shapeOf(ARGV[i]) end

local function shape(key)
  if index == '' then return shapes[1] end
  local low, high = byte(index, 2 * key - 1, 2 * key)
  return shapes[low + 256 * high + 1]
end

-- The full way: the parts that begin at a key. It returns the answer, and the first key after them.
local function fullWay()
  --#include state.lua

  local function take(s, r, asked, now, spent)
    local cost = min(asked, max(0, r.M - spent))
    if r.k == 1 then
      s[3], s[4] = s[3] or 0, (s[4] or 0) + cost * r.one
    elseif cost > 0 then
      local e, n = finish(r, now), #s
      if n > 2 and (r.k == 0 or s[n - 1] >= e) then
        s[n] = s[n] + cost
      else
        s[n + 1], s[n + 2] = e, cost
      end
    end
    return spent + cost
  end

  -- The rules of a shape, with their costs.
  local function rules(s)
    if not s[$rules] then
      local p, r = 4, nil
      s[$rules] = {}
      for j, b in ipairs(s[$buckets]) do
        r, p = law(s[$prefix], p)
        rule(r, b[$capacity], r.k == LOG and b[$grain] or b[$tick])
        s[$rules][j], r.cost, p = r, b[$cost], p + 1
      end
    end
    return s[$rules]
  end

  -- How many tokens a call may take of a bucket of which so many are spent. A reservation looks ahead.
  local function roomOf(r, state, spent, real, within)
    local now = state and max(real, state[2]) or real
    if not state or r.k ~= 1 or real + within <= now then return r.C - spent end
    local u = spent > 0 and left(state, real + within) or 0
    return min(r.C - ceil(u / r.one), r.M - spent)
  end

  -- When a bucket admits what it denies.
  local function retry(r, state, now, least, spent, within)
    local at = back(state, now, r.C - least, spent)
    if r.k == 1 then at = at - within end
    if spent > r.M - least then at = max(at, back(state, now, r.M - least, spent)) end
    return at
  end

  -- What all buckets have of the parts that are content with less, and at least one.
  local function share(parts)
    local most = 2 ^ 53
    for _, part in ipairs(parts) do
      for j, r in ipairs(part.rules) do
        local has = r.C - part.spent[j]
        if part.less and has < r.cost then most = min(most, max(1, has)) end
      end
    end
    return most
  end

  return function(key)
    local failed, allowed, stale, asked, parts, s = nil, true, false, false, {}, nil
    local unsure -- whether a state is doubted of which nothing is asked: it counts if all are only looked at
    repeat
      s = shape(key)
      local of, real = rules(s), s[$now]
      local states, others = load(KEYS[key], of, real)
      if not states then
        if sub(others, 1, 1) == char(4) then others = others .. char(#parts) end
        failed, states = failed or others, {}
      end
      local spent, least, room = {}, {}, {}
      for j = 1, #of do
        local state, r = under(states[j], of[j]), of[j]
        spent[j] = 0
        if state and not believable(state, real) then state = nil end -- 1
        if state then spent[j] = out(state, max(real, state[2])) end -- 2, 3
        if r.cost > 0 then asked = true end
        if s[$doubted] and (not state or state[2] <= s[$doubted]) then stale, unsure = stale or r.cost > 0, true end
        least[j] = s[$less] and min(r.cost, 1) or r.cost
        room[j] = roomOf(r, state, spent[j], real, s[$within])
        if least[j] > room[j] and r.cost > 0 and s[$mode] ~= FORCE then allowed = false end -- 4
      end
      parts[#parts + 1] = {
        key = KEYS[key], rules = of, states = states, others = others, spent = spent, real = real, served = s[$served],
        least = least, room = room, less = s[$less], within = s[$within],
      }
      key = key + 1
    until not s[$more]
    if failed then return failed, key end
    if allowed and (stale or unsure and not asked) then return char(6), key end

    local answer, most = { allowed and '\1' or '\0' }, share(parts)
    for _, part in ipairs(parts) do
      local changed, real = false, part.real
      for j, r in ipairs(part.rules) do
        local state, n, now, wait, held, cost = part.states[j], part.spent[j], nil, 0, 0, r.cost
        local told = n
        if allowed and part.less then cost = min(cost, most) end
        if allowed and cost > 0 then -- 5
          state, now = open(state, r, real)
          told = n + cost
          n = take(state, r, cost, now, n)
          part.states[j], changed, held = state, true, gone(state) - real
          if part.within > 0 and n > r.C then wait = back(state, now, r.C, n) - real end
        else
          state = under(state, r)
          if not state or not believable(state, real) then state = { r, real } end
          now = max(real, state[2])
          if part.least[j] > part.room[j] and cost > 0 then wait = retry(r, state, now, part.least[j], n, part.within) - real end
        end
        local next = back(state, now, max(0, min(n, r.C) - 1), n)
        answer[#answer + 1] = pack('<I7I7I7I7I7I7', told, back(state, now, 0, n) - real, next - real, wait, held, cost)
      end
      if changed and s[$mode] ~= PEEK then store(part.key, part.states, part.rules, part.others, real, not part.served) end
    end
    return concat(answer), key
  end
end

local answer, n, full, values, lives = { pack('<I7', time or 0) }, 1, nil, {}, {}
local key, keys, s, same = 1, #KEYS, shapes[1], index == ''
while key <= keys do
  local first, at, allowed, old, admitted = key, n + 1, true, nil, nil
  n = at
  repeat
    if not same then s = shape(key) end
    old = nil
    if s[$way] then old, admitted, values[key], lives[key] = s[$way](KEYS[key], s) end
    if not old then break end
    n = n + 1
    answer[n] = old
    allowed = allowed and admitted
    key = key + 1
  until not s[$more]
  if not old then
    full = full or fullWay()
    answer[at], key = full(first)
    n = at
  else
    answer[at] = allowed and '\8' or '\7'
    if allowed and s[$mode] ~= PEEK then
      for k = first, key - 1 do
        if lives[k] == 0 then
          call('SET', KEYS[k], values[k], 'KEEPTTL')
        else
          call('SET', KEYS[k], values[k], 'PX', lives[k])
        end
      end
    end
  end
end
return concat(answer, '', 1, n)
