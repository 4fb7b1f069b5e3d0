#!lua
-- One batch of one session, all of it or, if it must not be, nothing: what speaks against it is asked first.
-- KEYS[1]: the prefix of the namespace.  ARGV: what is to be done, the session, and for
--   born    its time to live (ms), the retention named (ms), the highest token seen
--   beat    its time to live, the batch that it must know
--   apply   its time to live, the batch's number, the last one before, then eight fields an operation:
--           verb, key, token, attempts ("" for none), reason, result, fingerprint, flags ("r", "f": which are there)
--   void    a batch's number: it must not take effect any more; answers what became of it
--   look    keys
--   await   a key and a token: tell when that claim is over
-- A key's value: state, token, attempt, at (ms), session or "-", "w" if awaited or "-", each with a blank behind it,
-- then the length of the reason, the result, the fingerprint (-1: none), then the three.
local prefix = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local verb, me = ARGV[1], ARGV[2]
local mine = prefix .. 's:' .. me

local function whole(number)
  return string.format('%.0f', number)
end

local function read(text)
  if not text then
    return nil
  end
  local state, token, attempt, at, session, awaited, n1, n2, n3, start =
    string.match(text, '^(%a+) (%d+) (%d+) (%d+) (%S+) (%S) (%d+) (-?%d+) (-?%d+) ()')
  n1, n2, n3 = tonumber(n1), tonumber(n2), tonumber(n3)
  local behind = start + n1 + math.max(n2, 0)
  return {
    state = state, token = tonumber(token), attempt = tonumber(attempt), at = tonumber(at),
    session = session, awaited = awaited, reason = string.sub(text, start, start + n1 - 1),
    has_result = n2 >= 0, result = string.sub(text, start + n1, behind - 1),
    has_print = n3 >= 0, print = string.sub(text, behind),
  }
end

local function written(entry)
  return table.concat({
    entry.state, whole(entry.token), whole(entry.attempt), whole(entry.at), entry.session, entry.awaited,
    whole(#entry.reason), whole(entry.has_result and #entry.result or -1),
    whole(entry.has_print and #entry.print or -1), entry.reason .. entry.result .. entry.print,
  }, ' ')
end

local living = {}
local function alive(session)
  if living[session] == nil then
    living[session] = session ~= '-' and redis.call('EXISTS', prefix .. 's:' .. session) == 1
  end
  return living[session]
end

local entries = {}
local function load(key)
  if entries[key] == nil then
    entries[key] = read(redis.call('GET', prefix .. 'k:' .. key)) or false
  end
  return entries[key] or nil
end

-- What everybody is told: "B" or "D" says whether a claim's session lives, then the value as it is.
local function view(key)
  local entry = load(key)
  if not entry then
    return '-'
  end
  return (entry.state == 'claimed' and alive(entry.session) and 'B ' or 'D ') .. written(entry)
end

if verb == 'look' then
  local answers = {}
  for i = 3, #ARGV do
    answers[i - 2] = view(ARGV[i])
  end
  return answers
end

if verb == 'born' then
  local retention = math.max(tonumber(redis.call('GET', prefix .. 'retention') or '0'), tonumber(ARGV[4]))
  -- Tokens grow with the clock too, so that none comes twice where the last of them were forgotten.
  local token = math.max(tonumber(redis.call('GET', prefix .. 'token') or '0'), now * 1000, tonumber(ARGV[5]))
  redis.call('SET', prefix .. 'retention', whole(retention))
  redis.call('SET', prefix .. 'token', whole(token))
  redis.call('SET', mine, '0 ', 'PX', ARGV[3])
  return {whole(token), whole(retention)}
end

local held = redis.call('GET', mine)

if verb == 'beat' and held then
  local known = string.match(held, '^%d+')
  if tonumber(known) < tonumber(ARGV[4]) then
    return {'forgotten', known}
  end
  redis.call('PEXPIRE', mine, ARGV[3])
  return {'ok'}
end

if verb == 'await' then
  local entry = load(ARGV[3])
  if entry and entry.state == 'claimed' and whole(entry.token) == ARGV[4] and entry.awaited ~= 'w' then
    entry.awaited = 'w'
    redis.call('SET', prefix .. 'k:' .. ARGV[3], written(entry))
  end
  return 1
end

if not held then
  return {'dead'}
end
local last, codes = string.match(held, '^(%d+) (.*)$')

if verb == 'void' then
  if last == ARGV[3] then
    return {'applied', codes}
  end
  if tonumber(last) < tonumber(ARGV[3]) then
    redis.call('SET', mine, ARGV[3] .. ' ', 'KEEPTTL')
  end
  return {'void'}
end

-- apply
local ttl, batch, before = ARGV[3], ARGV[4], ARGV[5]
if last == batch then
  -- Repeated, because the reply was lost: what changed nothing is looked up anew.
  local answers, i = {'again', codes}, 6
  while i <= #ARGV do
    answers[#answers + 1] = view(ARGV[i + 1])
    i = i + 8
  end
  return answers
end
if last ~= before then
  return {'forgotten', last}
end

local retention = redis.call('GET', prefix .. 'retention')
if not retention then
  return {'dead'}
end
local first = math.max(tonumber(redis.call('GET', prefix .. 'token') or '0'), now * 1000)
local token = first
local changed, order, tell = {}, {}, false
living[me] = true

local function put(key, entry)
  local old = load(key)
  tell = tell or (old ~= nil and old.awaited == 'w')
  if not changed[key] then
    changed[key] = true
    order[#order + 1] = key
  end
  entries[key] = entry or false
end

local function made(state, number, attempt, session, reason)
  return {
    state = state, token = number, attempt = attempt, at = now, session = session, awaited = '-', reason = reason,
    has_result = false, has_print = false, result = '', print = '',
  }
end

local function give(key, attempts, reason)
  token = token + 1
  put(key, made('claimed', token, attempts + 1, me, reason))
  return 'C' .. whole(token - first) .. ' ' .. whole(attempts + 1)
end

-- "A": applied.  "C": claimed.  "": look at the key's state, which stood against it.
local function one(op, key, named, attempts, reason, result, print, flags)
  local entry = load(key)
  local current = entry and whole(entry.token) == named
  local mine_now = current and entry.state == 'claimed'
  if op == 'claim' then
    if not entry or entry.state == 'free' then
      return give(key, entry and entry.attempt or 0, '')
    end
  elseif op == 'complete' then
    if mine_now then
      local done = made('done', entry.token, entry.attempt, '-', '')
      done.has_result, done.result = string.find(flags, 'r') ~= nil, result
      done.has_print, done.print = string.find(flags, 'f') ~= nil, print
      put(key, done)
      return 'A'
    end
    if current and entry.state == 'done' then
      return 'A'
    end
  elseif op == 'takeover' then
    if current and entry.state == 'parked' then
      return give(key, entry.attempt, entry.reason)
    end
    if mine_now and not alive(entry.session) then
      return give(key, entry.attempt, entry.reason)
    end
  elseif op == 'release' then
    if mine_now then
      put(key, attempts ~= '0' and made('free', entry.token, tonumber(attempts), '-', '') or nil)
      return 'A'
    end
  elseif op == 'abandon' then
    if mine_now then
      local count = attempts == '' and entry.attempt or tonumber(attempts)
      local left = made('claimed', entry.token, count, '-', entry.reason)
      left.at = entry.at
      put(key, left)
      return 'A'
    end
  elseif op == 'park' then
    if mine_now then
      token = token + 1
      put(key, made('parked', token, entry.attempt, '-', reason))
      return 'A'
    end
  elseif op == 'forget' then
    local left = entry and entry.state == 'claimed' and entry.reason ~= '' and not alive(entry.session)
    if current and (entry.state == 'done' or entry.state == 'parked' or left) then
      put(key, nil)
      return 'A'
    end
  end
  return ''
end

local answers, said, i = {'ok', '', ''}, {}, 6
while i <= #ARGV do
  local key = ARGV[i + 1]
  local code = one(ARGV[i], key, ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], ARGV[i + 6], ARGV[i + 7])
  said[#said + 1] = code
  answers[#answers + 1] = code == '' and view(key) or ''
  i = i + 8
end
codes = table.concat(said, ',')
answers[2], answers[3] = codes, whole(first)
answers[#answers + 1] = retention
answers[#answers + 1] = tell and '1' or '0'
if not string.find(codes, '[AC]') then
  return answers
end
for _, key in ipairs(order) do
  local entry, name = entries[key], prefix .. 'k:' .. key
  if not entry then
    redis.call('DEL', name)
  elseif entry.state == 'done' or entry.state == 'free' then
    redis.call('SET', name, written(entry), 'PX', retention)
  else
    redis.call('SET', name, written(entry))
  end
end
if token > first then
  redis.call('SET', prefix .. 'token', whole(token))
end
redis.call('SET', mine, batch .. ' ' .. whole(first) .. ' ' .. codes, 'PX', ttl)
if tell then
  redis.call('PUBLISH', prefix .. 'settled', '')
end
return answers
