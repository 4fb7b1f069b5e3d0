-- One turn of a connection to the broker: settle, publish, take; or a look at it.
--
-- KEYS[1]: the prefix of the namespace.  ARGV[1]: what to do.  The time is the server's.
--
-- A queue is a stream of its own, read by one group of its name; what is acknowledged is deleted.  It
-- may also follow shared streams, by a group of the same name in each; there an acknowledgement
-- deletes nothing.  What a consumer gives back is pending of the consumer `returned`.

local prefix = KEYS[1]
local RETURNED = 'returned'
local PAGE = 500
local MOST = 8 * 1024 * 1024
local FORGET = 3600 * 1000

local place = 1
local function word()
  place = place + 1
  return ARGV[place]
end
local function number()
  return tonumber(word())
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function own(queue)
  return prefix .. 'queue:' .. queue
end
local function delayed(queue)
  return prefix .. 'delayed:' .. queue
end
local function version()
  return redis.call('GET', prefix .. 'topology') or '0'
end

local function topology()
  return {
    'topology',
    version(),
    redis.call('SMEMBERS', prefix .. 'queues'),
    redis.call('SMEMBERS', prefix .. 'bindings'),
    redis.call('SMEMBERS', prefix .. 'shared'),
  }
end

local function about_group(key, group)
  for _, row in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local about = {}
    for n = 1, #row, 2 do
      about[row[n]] = row[n + 1]
    end
    if about.name == group then
      return about
    end
  end
  return nil
end

-- A server that is full makes nothing, but what is there already may be emptied: so it is looked for first.
local function make_group(key, group)
  if redis.call('EXISTS', key) == 1 and about_group(key, group) then
    return
  end
  local made = redis.pcall('XGROUP', 'CREATE', key, group, '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP') then
    error(made.err)
  end
end

local function include(set, member)
  return redis.call('SISMEMBER', set, member) == 0 and redis.call('SADD', set, member) or 0
end

-- queue, "exchange"|"shared"|"", name, binding as it is kept
local function declare()
  local queue, kind, name, binding = word(), word(), word(), word()
  make_group(own(queue), queue)
  local new = include(prefix .. 'queues', queue)
  if kind == 'shared' then
    make_group(name, queue)
    new = new + include(prefix .. 'shared', binding)
  elseif kind == 'exchange' then
    new = new + include(prefix .. 'bindings', binding)
  end
  if new > 0 then
    redis.call('INCR', prefix .. 'topology')
  end
  return topology()
end

local function ripen(queue)
  local key = delayed(queue)
  local ripe = redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, PAGE)
  for n, content in ipairs(ripe) do
    local fields = cmsgpack.unpack(content)
    local added = redis.pcall('XADD', own(queue), '*', unpack(fields, 2))
    if type(added) == 'table' and added.err then
      if not string.find(added.err, 'OOM') then
        error(added.err)
      end
      -- Full: what is in the queue already may be taken meanwhile.
      if n > 1 then
        redis.call('ZREM', key, unpack(ripe, 1, n - 1))
      end
      return 1000
    end
  end
  if #ripe > 0 then
    redis.call('ZREM', key, unpack(ripe))
  end
  local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2]
  return first and math.max(0, tonumber(first) - now) or -1
end

local function each_page(ids, act)
  local page = {}
  for id in string.gmatch(ids, '%S+') do
    page[#page + 1] = id
    if #page == PAGE then
      act(page)
      page = {}
    end
  end
  if #page > 0 then
    act(page)
  end
end

local function acknowledge(key, group, ids, gone)
  each_page(ids, function(page)
    redis.call('XACK', key, group, unpack(page))
    if gone then
      redis.call('XDEL', key, unpack(page))
    end
  end)
end

local function publish()
  local kind, name, delay, size = word(), word(), number(), number()
  local fields = {}
  for n = 1, size do
    fields[n] = word()
  end
  if kind == 'shared' then
    redis.call('XADD', name, '*', unpack(fields))
  elseif delay > 0 then
    local once = redis.call('INCR', prefix .. 'sequence')
    redis.call('ZADD', delayed(name), now + delay, cmsgpack.pack({ tostring(once), unpack(fields) }))
  else
    redis.call('XADD', own(name), '*', unpack(fields))
  end
end

-- ------------------------------------------------------------------ taking

local function pending_of(key, group, consumer, most)
  local ids = {}
  for _, row in ipairs(redis.call('XPENDING', key, group, '-', '+', most, consumer)) do
    ids[#ids + 1] = row[1]
  end
  return ids
end

-- What is mine stays mine while I say so: in pages, for a consumer may have any number out.
local function renew(key, group, me)
  if redis.call('EXISTS', key) == 0 then
    return
  end
  local start = '-'
  while true do
    local rows = redis.call('XPENDING', key, group, start, '+', PAGE, me)
    local ids = {}
    for _, row in ipairs(rows) do
      ids[#ids + 1] = row[1]
    end
    if #ids == 0 then
      return
    end
    ids[#ids + 1] = 'JUSTID'
    redis.call('XCLAIM', key, group, me, 0, unpack(ids))
    if #rows < PAGE then
      return
    end
    start = '(' .. rows[#rows][1]
  end
end

local function size_of(entries)
  local size = 0
  for _, entry in ipairs(entries) do
    for _, text in ipairs(entry[2] or {}) do
      size = size + #text
    end
  end
  return size
end

local function take_returned(key, group, me, room, got)
  local ids = pending_of(key, group, RETURNED, math.min(room, 64))
  if #ids > 0 then
    for _, entry in ipairs(redis.call('XCLAIM', key, group, me, 0, unpack(ids))) do
      if entry and entry[2] then
        got[#got + 1] = { entry, 1 }
      end
    end
  end
  return #ids
end

local function take_abandoned(key, group, me, room, idle, got)
  local cursor, claimed = '0-0', 0
  for _ = 1, 100 do
    local found = redis.call('XAUTOCLAIM', key, group, me, idle, cursor, 'COUNT', math.min(room - claimed, 64))
    for _, entry in ipairs(found[2]) do
      if entry and entry[2] then
        got[#got + 1] = { entry, 1 }
        claimed = claimed + 1
      end
    end
    cursor = found[1]
    if cursor == '0-0' or claimed >= room then
      break
    end
  end
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', key, group)) do
    local about = {}
    for n = 1, #consumer, 2 do
      about[consumer[n]] = consumer[n + 1]
    end
    if about.name ~= RETURNED and about.name ~= me and about.pending == 0 and about.idle > FORGET then
      redis.call('XGROUP', 'DELCONSUMER', key, group, about.name)
    end
  end
  return claimed
end

-- Up to `room` entries of a stream, and how many of them a consumer that is gone had had.
local function take(key, group, me, room, idle)
  local got, claimed, size = {}, 0, 0
  if idle > 0 then
    redis.pcall('XGROUP', 'CREATECONSUMER', key, group, me) -- a server that is full refuses; the next does it
    claimed = take_abandoned(key, group, me, room, idle, got)
  end
  while #got < room and size < MOST do
    local before = #got
    local found = take_returned(key, group, me, room - #got, got)
    for n = before + 1, #got do
      size = size + size_of({ got[n][1] })
    end
    if found == 0 then
      break
    end
  end
  while #got < room and size < MOST do
    local wanted = math.min(room - #got, 64)
    local read = redis.call('XREADGROUP', 'GROUP', group, me, 'COUNT', wanted, 'STREAMS', key, '>')
    local entries = read and read[1] and read[1][2] or {}
    for _, entry in ipairs(entries) do
      got[#got + 1] = { entry, 0 }
    end
    size = size + size_of(entries)
    if #entries < wanted then
      break
    end
  end
  return got, claimed
end

-- Own entries as three texts, which costs the client a hundredth of what a nested answer does.
-- What somebody else has put there goes to the `others`.
local function packed(got, others)
  local ids, sizes, texts = {}, {}, {}
  for _, one in ipairs(got) do
    local fields = one[1][2]
    if fields[1] == 'envelope' and fields[3] == 'body' then
      ids[#ids + 1] = one[1][1]
      sizes[#sizes + 1] = one[2] .. ' ' .. #fields[2] .. ' ' .. #fields[4]
      texts[#texts + 1] = fields[2]
      texts[#texts + 1] = fields[4]
    else
      others[#others + 1] = { -1, one[1][1], one[2], fields }
    end
  end
  return table.concat(ids, ' '), table.concat(sizes, ' '), table.concat(texts)
end

-- Groups and readers of a shared stream: name, the last id before what each has not read or not settled.
local function each_reader(stream, act)
  if redis.call('EXISTS', stream) == 1 then
    for _, row in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      local about = {}
      for n = 1, #row, 2 do
        about[row[n]] = row[n + 1]
      end
      act(about.name, redis.call('XPENDING', stream, about.name)[2] or about['last-delivered-id'])
    end
  end
  local positions = redis.call('HGETALL', prefix .. 'readers:' .. stream)
  for n = 1, #positions, 2 do
    act(positions[n], positions[n + 1])
  end
end

-- The least of these: all before it is read by everybody.
local function unread(stream)
  local least = nil
  each_reader(stream, function(_, id)
    local a, b = string.match(id, '(%d+)-?(%d*)')
    a, b = tonumber(a), tonumber(b) or 0
    if least == nil or a < least[1] or (a == least[1] and b < least[2]) then
      least = { a, b, id }
    end
  end)
  return least and least[3]
end

-- Let go of the oldest that all have read, beyond `keep` entries.
local function trim(stream, keep)
  if redis.call('EXISTS', stream) == 0 then
    return
  end
  local over = redis.call('XLEN', stream) - keep
  local least = over > 0 and unread(stream)
  if least and least ~= '0-0' then
    local old = redis.call('XRANGE', stream, '-', '(' .. least, 'COUNT', math.min(over, 2 * PAGE))
    for start = 1, #old, PAGE do
      local ids = {}
      for n = start, math.min(#old, start + PAGE - 1) do
        ids[#ids + 1] = old[n][1]
      end
      redis.call('XDEL', stream, unpack(ids))
    end
  end
end

-- ------------------------------------------------------------------ what is asked

-- topology known, queue, consumer, room, idle, keep; what is settled: stream, group, "gone" or "", ids;
-- where the consumer holds something: stream, group; the shared streams that the queue follows; publications.
local function turn()
  local known, queue, me, room, idle, keep = word(), word(), word(), number(), number(), number()
  local settled, held, shared = {}, {}, {}
  for n = 1, number() do
    settled[n] = { word(), word(), word(), word() }
  end
  for n = 1, number() do
    held[n] = { word(), word() }
  end
  for n = 1, number() do
    shared[n] = word()
  end
  local publications = number()
  if publications > 0 and known ~= version() then
    return topology()
  end
  for _, some in ipairs(settled) do
    acknowledge(some[1], some[2], some[4], some[3] == 'gone')
  end
  if idle > 0 then
    for _, one in ipairs(held) do
      renew(one[1], one[2], me)
    end
    for _, stream in ipairs(keep >= 0 and shared or {}) do
      trim(stream, keep)
    end
  end
  for _ = 1, publications do
    publish()
  end
  if room <= 0 then
    return { 'ok', '', '', '', {}, -1, 0, {} }
  end
  local due = ripen(queue)
  local got, claimed = take(own(queue), queue, me, room, idle)
  local others = {}
  for n, stream in ipairs(shared) do
    local left = room - #got - #others
    if left > 0 then
      local some, more = take(stream, queue, me, left, idle)
      claimed = claimed + more
      for _, one in ipairs(some) do
        others[#others + 1] = { n - 1, one[1][1], one[2], one[1][2] }
      end
    end
  end
  local ids, sizes, texts = packed(got, others)
  local behind = {}
  if #ids + #others == 0 then
    behind[1] = about_group(own(queue), queue)['last-delivered-id']
    for n, stream in ipairs(shared) do
      behind[n + 1] = about_group(stream, queue)['last-delivered-id']
    end
  end
  return { 'ok', ids, sizes, texts, others, due, claimed, behind }
end

-- Give back what these consumers had, and let them go.
local function leave()
  for _ = 1, number() do
    local key, group, consumer = word(), word(), word()
    if redis.call('EXISTS', key) == 1 and about_group(key, group) then
      local ids = pending_of(key, group, consumer, PAGE)
      while #ids > 0 do
        ids[#ids + 1] = 'JUSTID'
        redis.call('XCLAIM', key, group, RETURNED, 0, unpack(ids))
        ids = pending_of(key, group, consumer, PAGE)
      end
      redis.call('XGROUP', 'DELCONSUMER', key, group, consumer)
    end
  end
  return { 'ok' }
end

local function waiting(key, group, idle)
  if redis.call('EXISTS', key) == 0 then
    return 0, 0, 0
  end
  local about = about_group(key, group)
  if not about then
    return 0, 0, 0
  end
  local pending = redis.call('XPENDING', key, group)
  local out, returned = pending[1], 0
  for _, row in ipairs(pending[4] or {}) do
    if row[1] == RETURNED then
      returned = tonumber(row[2])
    end
  end
  local lag = about.lag
  if not lag then
    lag = 0
    local start = '(' .. about['last-delivered-id']
    while true do
      local page = redis.call('XRANGE', key, start, '+', 'COUNT', PAGE)
      lag = lag + #page
      if #page < PAGE then
        break
      end
      start = '(' .. page[#page][1]
    end
  end
  local consumers = 0
  for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', key, group)) do
    if row[2] ~= RETURNED and row[6] >= idle then
      -- Its consumer is gone: whoever polls next takes it.
      returned = returned + row[4]
    elseif row[2] ~= RETURNED then
      consumers = consumers + 1
    end
  end
  return lag + returned, out - returned, consumers
end

-- queue, the idle time, shared streams: ready, out, delayed, consumers
local function look()
  local queue, idle = word(), number()
  if redis.call('SISMEMBER', prefix .. 'queues', queue) == 0 then
    return { 'none' }
  end
  ripen(queue)
  local ready, out, consumers = waiting(own(queue), queue, idle)
  for _ = 1, number() do
    local more, taken, others = waiting(word(), queue, idle)
    ready, out, consumers = ready + more, out + taken, math.max(consumers, others)
  end
  return { 'ok', ready, out, redis.call('ZCARD', delayed(queue)), consumers }
end

local function readers()
  local stream = word()
  local found = { redis.call('EXISTS', stream) == 1 and redis.call('XLEN', stream) or 0 }
  each_reader(stream, function(name, id)
    found[#found + 1] = name
    found[#found + 1] = id
  end)
  return found
end

local todo = { readers = readers, turn = turn, declare = declare, leave = leave, look = look, topology = topology }
return todo[ARGV[1]]()
