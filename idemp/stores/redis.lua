#!lua
-- One batch of one session, all of it or, if it must not be, nothing: what speaks against it is asked first.
-- KEYS[1]: the prefix of the namespace.  ARGV: what is to be done, the session, and for
--   born    its time to live (ms), the retention named (ms), the highest token seen, the channel
--   apply   its time to live, the batch's number, the last one before, the channel, how many of those who
--           listen there are this process, then for each operation its verb, its key, and what `SIZES` counts:
--           token; release, abandon: attempts ("" for none); park: reason;
--           complete: result, fingerprint, flags ("r", "f": which are there)
--   void    a batch's number: it must not take effect any more; answers what became of it
--   look    keys
--   await   a key and a token: tell when that claim is over
-- A key's value: state, token, attempt, at (ms), session or "-", "w" if awaited or "-", each with a blank behind it,
-- then the length of the reason, the result, the fingerprint (-1: none), then the three.
-- Beside these: "retention" (ms); "since", a retention and when it began (ms), for what was done before goes by the
-- one before it; "token", the highest.
-- The channel tells: "", a claim that was awaited is over; "F", lines of what was forgotten; "D", of what is done.
local LARGE = 10000 -- of recall.py: what is larger nobody is told
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

local texts, entries = {}, {}
local function fetch(key)
  local text = texts[key]
  if text == nil then
    text = redis.call('GET', prefix .. 'k:' .. key)
    texts[key] = text
  end
  return text
end

local function load(key)
  if entries[key] == nil then
    entries[key] = read(fetch(key)) or false
  end
  return entries[key] or nil
end

-- What everybody is told: "B" or "D" says whether a claim's session lives, then the value as it is.
local function view(key)
  local text = fetch(key)
  if not text then
    return '-'
  end
  local session = string.match(text, '^claimed %d+ %d+ %d+ (%S+)')
  return (session and alive(session) and 'B ' or 'D ') .. text
end

if verb == 'look' then
  local answers = {}
  for i = 3, #ARGV do
    answers[i - 2] = view(ARGV[i])
  end
  return answers
end

if verb == 'born' then
  -- Who may not tell, or not ask who listens, hears that before anything is written.
  redis.call('PUBLISH', ARGV[6], '')
  redis.call('PUBSUB', 'NUMSUB', ARGV[6])
  local retention = math.max(tonumber(redis.call('GET', prefix .. 'retention') or '0'), tonumber(ARGV[4]))
  -- Tokens grow with the clock too, so that none comes twice where the last of them were forgotten.
  local token = math.max(tonumber(redis.call('GET', prefix .. 'token') or '0'), now * 1000, tonumber(ARGV[5]))
  redis.call('SET', prefix .. 'retention', whole(retention))
  if string.match(redis.call('GET', prefix .. 'since') or '', '^%d+') ~= whole(retention) then
    redis.call('SET', prefix .. 'since', whole(retention) .. ' ' .. whole(now))
  end
  redis.call('SET', prefix .. 'token', whole(token))
  redis.call('SET', mine, '0 ', 'PX', ARGV[3])
  return {whole(token), whole(retention)}
end

local held = redis.call('GET', mine)

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
local SIZES = {claim = 2, get = 2, complete = 6, takeover = 3, release = 4, abandon = 4, park = 4, forget = 3}
local ttl, batch, before, channel, mine_there = ARGV[3], ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
if last == batch then
  -- Repeated, because the reply was lost: what changed nothing is looked up anew.
  local answers, i = {'again', codes}, 8
  while i <= #ARGV do
    answers[#answers + 1] = view(ARGV[i + 1])
    i = i + SIZES[ARGV[i]]
  end
  return answers
end
if last ~= before then
  return {'forgotten', last}
end

local known = redis.call('MGET', prefix .. 'retention', prefix .. 'token', prefix .. 'since')
local retention = known[1]
if not retention then
  return {'dead'}
end
local first = math.max(tonumber(known[2] or '0'), now * 1000)
-- Who has raised the retention and is of an idemp before this one does not say when.
local longer, since = string.match(known[3] or '', '^(%d+) (%d+)$')
since = longer == retention and since or whole(now)
local token, at = first, whole(now)
local changed, order, lasting, tell, forgotten = {}, {}, {}, false, {}
living[me] = true

-- All keys of the batch, some hundred at a time: one by one they cost more than all that is done with them.
local starts, keys = {}, {}
do
  local i, known = 8, {}
  while i <= #ARGV do
    local key = ARGV[i + 1]
    starts[#starts + 1] = i
    if not known[key] then
      known[key] = true
      keys[#keys + 1] = key
    end
    i = i + SIZES[ARGV[i]]
  end
  for from = 1, #keys, 500 do
    local names = {}
    for n = from, math.min(from + 499, #keys) do
      names[#names + 1] = prefix .. 'k:' .. keys[n]
    end
    for n, text in ipairs(redis.call('MGET', unpack(names))) do
      texts[keys[from + n - 1]] = text
    end
  end
end

-- lasts: it goes with the retention.
local function put_text(key, text, lasts)
  if not changed[key] then
    changed[key] = true
    order[#order + 1] = key
  end
  texts[key], entries[key], lasting[key] = text, nil, lasts
end

local function put(key, entry)
  local old = load(key)
  tell = tell or (old ~= nil and old.awaited == 'w')
  put_text(key, entry and written(entry) or false, entry and entry.state == 'free')
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

local news, bodies, heard = {}, {}, nil
local function tell_done(key, named, attempt, result, print, sizes)
  if heard == nil then
    heard = redis.call('PUBSUB', 'NUMSUB', channel)[2] > mine_there
  end
  if heard and #result + #print <= LARGE then
    news[#news + 1] = named .. ' ' .. attempt .. ' ' .. #key .. ' ' .. sizes
    bodies[#bodies + 1] = key .. result .. print
  end
end

local function complete(key, named, result, print, flags)
  local text, head = fetch(key), 'claimed ' .. named .. ' '
  if text and string.sub(text, 1, #head) == head then
    local attempt, awaited = string.match(text, '^(%d+) %d+ %S+ (%S)', #head + 1)
    tell = tell or awaited == 'w'
    local sizes = (string.find(flags, 'r') and #result or -1) .. ' ' .. (string.find(flags, 'f') and #print or -1)
    local done = 'done ' .. named .. ' ' .. attempt .. ' ' .. at .. ' - - 0 ' .. sizes .. ' ' .. result .. print
    put_text(key, done, true)
    tell_done(key, named, attempt, result, print, sizes)
    return 'D' .. attempt
  end
  head = 'done ' .. named .. ' '
  return text and string.sub(text, 1, #head) == head and 'A' or ''
end

local function claim(key)
  if not fetch(key) then
    token = token + 1
    put_text(key, 'claimed ' .. whole(token) .. ' 1 ' .. at .. ' ' .. me .. ' - 0 -1 -1 ', false)
    return 'C' .. (token - first) .. ' 1'
  end
  local entry = load(key)
  return entry.state == 'free' and give(key, entry.attempt, '') or ''
end

-- "A": applied.  "D": done by that, at which attempt.  "C": claimed.  "": look at the state that stood against it.
local function one(i)
  local op, key, named = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if op == 'claim' then
    return claim(key)
  elseif op == 'complete' then
    return complete(key, named, ARGV[i + 3], ARGV[i + 4], ARGV[i + 5])
  elseif op == 'get' then
    return ''
  end
  local entry = load(key)
  if not entry or whole(entry.token) ~= named then
    return ''
  end
  local mine_now, more = entry.state == 'claimed', ARGV[i + 3]
  if op == 'takeover' then
    if entry.state == 'parked' or (mine_now and not alive(entry.session)) then
      return give(key, entry.attempt, entry.reason)
    end
  elseif op == 'forget' then
    local left = mine_now and entry.reason ~= '' and not alive(entry.session)
    if entry.state == 'done' or entry.state == 'parked' or left then
      put(key, nil)
      if entry.state == 'done' then
        forgotten[#forgotten + 1] = {key, named}
      end
      return 'A'
    end
  elseif mine_now and op == 'release' then
    put(key, more ~= '0' and made('free', entry.token, tonumber(more), '-', '') or nil)
    return 'A'
  elseif mine_now and op == 'abandon' then
    local left = made('claimed', entry.token, more == '' and entry.attempt or tonumber(more), '-', entry.reason)
    left.at = entry.at
    put(key, left)
    return 'A'
  elseif mine_now and op == 'park' then
    token = token + 1
    put(key, made('parked', token, entry.attempt, '-', more))
    return 'A'
  end
  return ''
end

local answers, said = {'ok', '', ''}, {}
for n, i in ipairs(starts) do
  local code = one(i)
  said[n] = code
  answers[n + 3] = code == '' and view(ARGV[i + 1]) or ''
end
codes = table.concat(said, ',')
answers[2], answers[3] = codes, whole(first)
answers[#answers + 1] = retention
answers[#answers + 1] = tell and '1' or '0'
answers[#answers + 1] = at
answers[#answers + 1] = since
if not string.find(codes, '[ACD]') then
  return answers
end
local open = {}
for n, key in ipairs(order) do
  local text, name = texts[key], prefix .. 'k:' .. key
  if not text then
    redis.call('DEL', name)
  elseif lasting[key] then
    redis.call('SET', name, text, 'PX', retention)
  else
    open[#open + 1], open[#open + 2] = name, text
  end
  if #open == 1000 or (n == #order and #open > 0) then
    redis.call('MSET', unpack(open))
    open = {}
  end
end
if token > first then
  redis.call('SET', prefix .. 'token', whole(token))
end
redis.call('SET', mine, batch .. ' ' .. whole(first) .. ' ' .. codes, 'PX', ttl)
if tell then
  redis.call('PUBLISH', channel, '')
end
if #news > 0 then
  local head = table.concat({'D', me, at, table.concat(news, ',')}, '\n')
  redis.call('PUBLISH', channel, head .. '\n' .. table.concat(bodies))
end
if #forgotten > 0 then
  local lines, names = {}, {}
  for n, each in ipairs(forgotten) do
    lines[n], names[n] = each[2] .. ' ' .. #each[1], each[1]
  end
  redis.call('PUBLISH', channel, 'F\n' .. table.concat(lines, ',') .. '\n' .. table.concat(names))
end
return answers
