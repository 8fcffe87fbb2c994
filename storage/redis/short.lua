-- Take, Peek and Force, for any number of requests one after another.
--
-- ARGV[1] is empty, or has the number of its shape for each key (2). After it come the shapes, the
-- different parts of the requests, as two arguments each: the form of struct.unpack, and what it
-- reads as the list of
--
--   1  the beginning of a value in which these buckets have one hold each, changed at one time
--   2  the form of all of such a value, and 3 its length
--   4  mode, and 5 whether the next part belongs to the same request, with 2 if states are doubted
--   6  the time, or -1 for the server's
--   7  the number of buckets, and from 8 on for each of them kind, period, units that drain a tick, tick in µs, grain,
--      units a token, capacity and cost; then, if states are doubted, how long ago in µs the latest of
--      these was changed
--
-- The answer has one byte for each request, 1 if admitted, 0 if not, and for each bucket what is spent, also what Force
-- did not record, when it is full, when one token more is there, and if admitted when all of it is gone, else when it
-- admits the cost (7 each). Other first bytes stand alone: 2 if the
-- value is none of ours, 3 if it is no string, 4 if there are too many buckets, with their number and that of
-- the part after it (1 each), 6 if it would be admitted, and a state that it takes from is doubted or not there.
--
-- What follows is the short way for a request of one part whose buckets have at most one hold each, before and
-- after, under the laws of its rules: nearly all of them. Others go to decide.lua, which is put before
-- this as the function decider: making its functions costs as much as a decision.

local byte, concat, list, pack, unpack = string.byte, table.concat, unpack, struct.pack, struct.unpack
local ceil, call, try = math.ceil, redis.call, redis.pcall
local exact, far = 2 ^ 53, 2 ^ 50

local shapes, server = {}, nil
for i = 2, #ARGV, 2 do
  local shape = { unpack(ARGV[i], ARGV[i + 1]) }
  if shape[6] < 0 then
    if not server then
      local t = call('TIME')
      server = t[1] * 1000000 + t[2]
    end
    shape[6], shape.served = server, true
  end
  if shape[5] > 1 then
    shape[5], shape.doubted = shape[5] - 2, shape[6] - shape[8 * shape[7] + 8]
  end
  shapes[i / 2] = shape
end

local index, decide, keys = ARGV[1], nil, #KEYS
local out, pieces, units, spent = {}, 0, {}, {} -- out: the answers, in pieces
local i = 1
while i <= keys do
  local shape = shapes[1]
  if index ~= '' then
    local lo, hi = byte(index, 2 * i - 1, 2 * i)
    shape = shapes[lo + 256 * hi + 1]
  end
  local form, mode, real, n, doubted = shape[2], shape[4], shape[6], shape[7], shape.doubted
  local long = shape[5] > 0 -- whether it is not for the short way
  if not long then
    repeat
      local f, allowed, last, before = nil, true, 0, 0
      local v = try('GET', KEYS[i])
      if not v then
        f = { shape[1], real } -- then end and N of each bucket
      elseif type(v) == 'string' and #v == shape[3] then
        f = { unpack(form, v) }
        if f[1] ~= shape[1] then
          long = true
          break
        end
      else
        long = true
        break
      end
      local seen = f[2]
      local now = seen > real and seen or real -- 2
      local r, h = 8, 3 -- where a bucket begins in shape, and its hold in f
      for j = 1, n do
        local k, P, one, C, cost, u, m = shape[r], shape[r + 1], shape[r + 5], shape[r + 6], shape[r + 7], 0, f[h + 1]
        if k == 4 and shape[r + 4] > 1 or m and (seen > exact or f[h] > exact or m > exact or m < 1 or k == 1 and m / shape[r + 2] * shape[r + 3] > far) then
          long = true -- a log with a grain, a level of another refill, or perhaps none of ours
          break
        end
        if not m or seen > real + P + 60000000 then -- 1
          if seen > real then
            long = true
            break
          end
          f[h], f[h + 1] = 0, 0
        elseif k == 1 then -- 3
          local R, Q = shape[r + 2], shape[r + 3]
          local dt = (now - now % Q - seen + seen % Q) / Q
          if dt < ceil(m / R) then u = m - R * dt end
        elseif k == 3 then
          local e, Q = f[h] + P, shape[r + 3]
          local left = (e - e % Q - now + now % Q) / Q - 1
          if left >= one then
            u = m
          elseif left > 0 then
            u = m * left
            u = (u - u % one) / one
            if u == 0 or m * left > exact then -- the hold is not to be forgotten yet
              long = true
              break
            end
          end
        elseif f[h] > now then
          u = m
        end
        units[j] = u
        if k == 1 then u = ceil(u / one) end
        spent[j] = u
        if cost > C - u and cost > 0 and mode ~= 2 then allowed = false end -- 4
        r, h = r + 8, h + 2
      end
      if allowed and doubted and (not v or seen <= doubted) then long = true end
      if long then break end

      local piece = pieces + 1
      out[piece] = allowed and '\1' or '\0'
      r, h = 8, 3
      for j = 1, n do
        local k, P, one, C, cost = shape[r], shape[r + 1], shape[r + 5], shape[r + 6], shape[r + 7]
        local u, e, m, reset = spent[j], f[h], f[h + 1], now - real
        local told, next, gone = u, reset, 0
        piece = piece + 1
        if allowed then -- 5
          if cost == 0 then
            long = true
            break
          end
          told = u + cost
          if told > 4 * C then cost = u < 4 * C and 4 * C - u or 0 end
          u = u + cost
          if k == 1 then
            local R, Q = shape[r + 2], shape[r + 3]
            local t = now - now % Q - real
            e, m = 0, units[j] + cost * one
            reset = t + ceil(m / R) * Q
            next = t + ceil((m - ((u < C and u or C) - 1) * one) / R) * Q
            gone = reset
          else
            local finish, fade = now + P, 0
            if k == 2 then
              finish = finish - now % P
            elseif k == 3 then
              finish, fade = finish - now % P, P - shape[r + 3]
            end
            if u == cost then
              e, m = finish, cost
            elseif k == 0 or e >= finish then
              m = m + cost
              if e + fade > before then before = e + fade end
            else
              long = true
              break
            end
            gone = e + fade - real
            reset, next = gone, gone
            if k == 3 then
              local t, Q = e + P - real, shape[r + 3]
              reset, next = t - ceil(one / m) * Q, t - ceil((u < C and u or C) * one / m) * Q
            end
          end
          f[h], f[h + 1] = e, m
          if gone > last then last = gone end
        else
          local room = cost > 0 and C - cost or u
          if u > 0 then
            local some = (u < C and u or C) - 1
            if k == 1 then
              local R, Q = shape[r + 2], shape[r + 3]
              local t = seen - seen % Q - real
              reset = t + ceil(m / R) * Q
              next = t + ceil((m - some * one) / R) * Q
              if u > room then gone = t + ceil((m - room * one) / R) * Q end
            elseif k == 3 then
              local t, Q = e + P - real, shape[r + 3]
              reset, next = t - ceil(one / m) * Q, t - ceil((some + 1) * one / m) * Q
              if u > room then gone = t - ceil((room + 1) * one / m) * Q end
            else
              reset = e - real
              next = reset
              if u > room then gone = reset end
            end
          end
        end
        out[piece] = pack('<I7I7I7I7', told, reset, next, gone)
        r, h = r + 8, h + 2
      end
      if long then break end
      pieces = piece
      if allowed and mode ~= 1 then
        f[2] = now
        if not shape.served then
          call('SET', KEYS[i], pack(form, list(f)), 'PX', ceil(last / 1000) + 3601000)
        elseif last + real <= before and seen <= real then
          call('SET', KEYS[i], pack(form, list(f)), 'KEEPTTL')
        else
          call('SET', KEYS[i], pack(form, list(f)), 'PX', ceil(last / 1000) + 1000)
        end
      end
    until true
  end
  if long then
    decide = decide or decider()
    pieces = pieces + 1
    out[pieces], i = decide(shapes, index, i)
  else
    i = i + 1
  end
end
return concat(out, '', 1, pieces)
