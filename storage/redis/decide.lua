-- Decisions: Take, Peek and Force, for any number of requests, one after another.
--
-- KEYS has one key for each part of each request, in order. The arguments after the first are shapes. A shape is a part
-- of a request without its identifier; the shapes of one request follow each other. ARGV[1] has for each request the
-- index of its first shape (2 bytes); it is empty if all requests begin with the first one. A shape:
--
--   prefix   the prefix of a plain value: one hold for each bucket, nothing else, and one time of change for all
--   form     the format of a whole plain value for struct.unpack, and the length of such a value in bytes
--   mode     the Mode, and flags: 1 if the next part is of the same request, 2 for DecideFresh, 4 if less may be taken
--   time     the caller's time in µs, or -1 for the server's
--   within   how far a reservation looks ahead, in µs
--   young    for DecideFresh: a state changed less than this time ago is not in doubt, in µs
--   buckets  their number, and of each: kind, period, units that drain in a tick, tick, grain, units in a token,
--            capacity and cost
--
-- The answer begins with the server's time (7 bytes), or 0 if no shape needs it. For each request a byte follows:
--
--   0 denied, 1 admitted. For each bucket six integers follow (7 bytes each): the tokens spent, including those that
--     Force did not record; then the µs until the bucket is full, until one more token is available, until the cost is
--     available, and until everything spent is back if admitted; and the tokens taken
--   7 denied, 8 admitted. For each part the value before the decision follows, or a zero byte if there was none. The
--     client computes the rest
--   2 a value is not of this package, 3 a key holds no string
--   4 an identifier would have too many buckets. Their number and the index of the part follow (1 byte each)
--   6 DecideFresh would admit, but a state that it takes from is in doubt or missing; or, if all costs are 0, any state
--
-- The fast way decides nearly all requests: those whose values are absent or plain, and are still plain afterwards. It
-- judges all parts and then writes all of them. The full way decides the others. Its functions are made only when the
-- first request of a call needs them, as making them takes as long as a decision.
--
-- Most calls bring few decisions, and then half of their time goes into what is made once for a call. So the functions of
-- this file capture no locals: each local that a function captures is one more allocation, in every call. They get what
-- they use as parameters. Numbers have names such as $PEEK, which script.go replaces.
--
-- The numbers at the ends of lines are the steps of internal/law/decide.go.

--#numbers REPLENISH CONTINUOUS FIXED SLIDING LOG
--#numbers TAKE PEEK FORCE

local byte, concat, list, pack, unpack = string.byte, table.concat, unpack, struct.pack, struct.unpack
local ceil, floor, max, min, call, try = math.ceil, math.floor, math.max, math.min, redis.call, redis.pcall

-- The fast way for one part. It returns the value before the decision and whether the part is admitted. If it is, the
-- new value and its time to live in ms follow; 0 keeps the present one. It returns nothing if the full way must decide.
--
-- In each bucket m units are spent until e. After an admission the bucket is full at gone, and the value lives until
-- the last bucket is full.
--
-- Three things keep this exact:
--   - A product that exceeds 2^53 is rounded. It is then larger than any level, so the level is drained either way.
--   - The room is checked in units, and what is spent in tokens is the units rounded up. The results are the same,
--     because capacity and cost are whole numbers of tokens.
--   - A SlidingWindow whose hold fades is left to the full way. Here its hold ends with the present window and counts
--     in full, or it is gone.
local function fast(key, s, try, pack, unpack, ceil, list)
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

-- The fast way for one bucket and for two buckets whose tokens come back at once, by the server's time. They keep the
-- holds in locals: the table takes a sixth of the time. In the second bucket k units are spent until f.
local function one(key, s, try, pack, unpack, ceil)
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

local function two(key, s, try, pack, unpack, ceil)
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

-- Shapes and their buckets are lists, because a list is made faster than a table with names. A name such as $form
-- stands for a place in the list; script.go replaces it when it removes the comments. These are the places:
--#slots prefix form size mode now grace served more doubted rules buckets way within less
--#slots kind tick grain capacity cost take most room finish join latest fade drain ticks

-- The numbers of a bucket that the fast way needs:
--
--   take    the cost in units
--   most    the largest number of units that may ever be spent
--   room    the cost is admitted if at most so many units are spent before it
--   finish  the end of a new hold
--   join    a living hold that ends earlier cannot take the new tokens: then the full way decides
--   latest  the latest possible end of a hold: if one ends later, the full way decides
--   fade    how long after its end a hold is gone
--   ticks   now in whole ticks, if the bucket drains
--
-- The way of a shape is the function that decides its parts, or nil if only the full way can: less than the cost may be
-- taken, a bucket may stay without a hold because its cost is 0, or a log has a grain.
local index, shapes = ARGV[1], {}
local time -- the server's in µs, read once for all requests of the call
for i = 2, #ARGV do
  local prefix, form, size, mode, flags, now, within, young, n, p = unpack('<I2c0Bc0I2BBdddB', ARGV[i])
  local served, doubted, less, grace = now < 0, flags % 4 > 1, flags > 3, 3601000
  if served then
    if not time then
      local t = call('TIME')
      time = t[1] * 1000000 + t[2]
    end
    now, grace = time, 1000
  end
  local buckets, way, plain = {}, fast, served and not doubted
  for j = 1, n do
    local kind, period, drain, tick, grain, token, capacity, cost, after = unpack('<Bddddddd', ARGV[i], p)
    local unit, finish, join, latest, fade, ticks, most, ahead = 1, 0, 0, now + period, 0, 0, 4 * capacity, 0
    if kind == $CONTINUOUS then
      unit, latest, ticks, plain = token, 0, (now - now % tick) / tick, false
      most = max(most, min(4 * drain * (period / tick) / token, floor((2 ^ 53 - 1) / token)))
      ahead = drain * (floor((now + within) / tick) - ticks)
    elseif kind == $REPLENISH then
      finish = latest
    else
      finish = kind == $LOG and latest or now - now % period + period
      join = finish
      if kind == $SLIDING then fade, plain = period - tick, false end
    end
    most = most * unit
    -- A reservation has the room that there will be when its time within has passed. Force and a cost of 0 are bound only
    -- by most.
    local room = min((capacity - cost) * unit + ahead, most - cost * unit)
    if mode == $FORCE or cost == 0 then room = most end
    if less or cost == 0 and mode ~= $PEEK or grain > 1 then way = nil end
    buckets[j] = { kind, tick, grain, capacity, cost, cost * unit, most, room, finish, join, latest, fade, drain, ticks }
    p = after
  end
  if way and plain and n == 1 then way = one elseif way and plain and n == 2 then way = two end
  -- Young becomes the latest time of change for which a state is in doubt.
  shapes[i - 1] = { prefix, form, size, mode, now, grace, served, flags % 2 == 1, doubted and now - young, false, buckets, way, within, less }
end

-- Makes the full way: a function that decides the request with a first key and a first shape. It returns the answer and
-- the first key of the next request.
local function fullWay(shapes)
  local call, try = redis.call, redis.pcall
  --#include state.lua

  -- Adds a cost to a state, as far as the bucket may record it. Returns what is spent then.
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

  -- The rules of a shape with their costs, decoded at the first use. The laws are in the prefix, from byte 4 on: after
  -- 't2' and the number of buckets.
  local function rules(s)
    if not s[$rules] then
      local p, r = 4, nil
      s[$rules] = {}
      for j, b in ipairs(s[$buckets]) do
        r, p = law(s[$prefix], p)
        rule(r, b[$capacity], r.k == $LOG and b[$grain] or b[$tick])
        s[$rules][j], r.cost, p = r, b[$cost], p + 1
      end
    end
    return s[$rules]
  end

  -- The number of tokens that a call may take from a bucket, given what is spent. A reservation counts what will have
  -- drained when its time within has passed, up to the bound M.
  local function roomOf(r, state, spent, real, within)
    local now = state and max(real, state[2]) or real
    if not state or r.k ~= 1 or real + within <= now then return r.C - spent end
    local u = spent > 0 and left(state, real + within) or 0
    return min(r.C - ceil(u / r.one), r.M - spent)
  end

  -- The time at which a bucket will admit the cost that it denies.
  local function retry(r, state, now, least, spent, within)
    local at = back(state, now, r.C - least, spent)
    if r.k == 1 then at = at - within end
    if spent > r.M - least then at = max(at, back(state, now, r.M - least, spent)) end
    return at
  end

  -- The most tokens that a call takes from parts that accept less than their cost: what the emptiest of their buckets
  -- has, and at least one.
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

  return function(key, i)
    local failed, allowed, stale, asked, parts, s = nil, true, false, false, {}, nil
    local unsure -- whether a state is doubted of which nothing is asked: it counts if all are only looked at
    repeat
      s = shapes[i]
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
        if least[j] > room[j] and r.cost > 0 and s[$mode] ~= $FORCE then allowed = false end -- 4
      end
      parts[#parts + 1] = {
        key = KEYS[key], rules = of, states = states, others = others, spent = spent, real = real, served = s[$served],
        least = least, room = room, less = s[$less], within = s[$within],
      }
      key, i = key + 1, i + 1
    until not s[$more]
    -- An error of any part counts before doubt, and a doubt only if the request would be admitted. Nothing is written
    -- above this line.
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
          told = n + min(cost, r.M)
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
      if changed and s[$mode] ~= $PEEK then store(part.key, part.states, part.rules, part.others, real, not part.served) end
    end
    return concat(answer), key
  end
end

-- The requests. Each is tried by the fast way. If that cannot decide one of its parts, nothing of the request has been
-- written, and the full way decides all of it. So a request is written only when all its parts are judged.
local KEYS, answer, n, full, values, lives = KEYS, { pack('<I7', time or 0) }, 1, nil, {}, {}
local key, keys, same, request = 1, #KEYS, index == '', 0
while key <= keys do
  local first, at, i, allowed, old, admitted = key, n + 1, 1, true, nil, nil
  if not same then
    local low, high = byte(index, 2 * request + 1, 2 * request + 2)
    i, request = low + 256 * high + 1, request + 1
  end
  local s, of = nil, i
  n = at
  repeat
    s, old = shapes[of], nil
    local k = key - first + 1
    if s[$way] then old, admitted, values[k], lives[k] = s[$way](KEYS[key], s, try, pack, unpack, ceil, list) end
    if not old then break end
    n = n + 1
    answer[n] = old
    allowed = allowed and admitted
    key, of = key + 1, of + 1
  until not s[$more]
  if not old then
    full = full or fullWay(shapes)
    answer[at], key = full(first, i)
    n = at
  else
    answer[at] = allowed and '\8' or '\7'
    if allowed and s[$mode] ~= $PEEK then
      for k = 1, key - first do
        if lives[k] == 0 then
          call('SET', KEYS[first + k - 1], values[k], 'KEEPTTL')
        else
          call('SET', KEYS[first + k - 1], values[k], 'PX', lives[k])
        end
      end
    end
  end
end
return concat(answer, '', 1, n)
