-- Any request: the parts that begin at key i. It returns the answer, and the first key after them.

local function take(s, r, now, spent)
  local cost = min(r.cost, max(0, 4 * r.C - spent))
  if r.k == 1 then
    s[3], s[4] = 0, (s[4] or 0) + cost * r.one
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
local function rules(shape)
  if not shape.rules then
    local out, p = {}, 4
    for j = 1, shape[7] do
      out[j], p = law(shape[1], p)
      rule(out[j], shape[8 * j + 6], shape[8 * j + (out[j].k == 4 and 4 or 3)])
      out[j].cost, p = shape[8 * j + 7], p + 1
    end
    shape.rules = out
  end
  return shape.rules
end

return function(shapes, index, i)
  local failed, allowed, stale, parts, shape, real = nil, true, false, {}, nil, nil
  repeat
    local lo, hi = string.byte(index, 2 * i - 1, 2 * i)
    shape = shapes[lo and lo + 256 * hi + 1 or 1]
    real = shape[6]
    local of = rules(shape)
    local doubted = shape.doubted
    local states, others = load(KEYS[i], of, real)
    if not states then
      if sub(others, 1, 1) == char(4) then others = others .. char(#parts) end
      failed, states = failed or others, {}
    end
    local spent = {}
    for j = 1, #of do
      local s, r = under(states[j], of[j]), of[j]
      spent[j] = 0
      if s and not believable(s, real) then s = nil end -- 1
      if s then spent[j] = out(s, max(real, s[2])) end -- 2, 3
      if doubted and r.cost > 0 and (not s or s[2] <= doubted) then stale = true end
      if r.cost > r.C - spent[j] and r.cost > 0 and shape[4] ~= 2 then allowed = false end -- 4
    end
    parts[#parts + 1] = { key = KEYS[i], rules = of, states = states, others = others, spent = spent }
    i = i + 1
  until shape[5] == 0
  if failed then return failed, i end
  if allowed and stale then return char(6), i end

  local answer = { allowed and '\1' or '\0' }
  for k = 1, #parts do
    local part, changed = parts[k], false
    for j = 1, #part.rules do
      local s, r, n, now, last = part.states[j], part.rules[j], part.spent[j], nil, 0
      local told = n
      if allowed and r.cost > 0 then -- 5
        s, now = open(s, r, real)
        told = n + r.cost
        n = take(s, r, now, n)
        part.states[j], changed, last = s, true, gone(s) - real
      else
        s = under(s, r)
        if not s or not believable(s, real) then s = { r, real } end
        now = max(real, s[2])
        if r.cost > r.C - n and r.cost > 0 then last = back(s, now, r.C - r.cost, n) - real end
      end
      answer[#answer + 1] = pack('<I7I7I7I7', told, back(s, now, 0, n) - real, back(s, now, max(0, min(n, r.C) - 1), n) - real, last)
    end
    if changed and shape[4] ~= 1 then store(part.key, part.states, part.rules, part.others, real, not shape.served) end
  end
  return concat(answer), i
end
