#!lua flags=allow-oom
-- The session lives on, also where the server has no room left: this takes none.
-- KEYS[1]: the session's key.  ARGV: its time to live (ms), the batch that it must know.
local held = redis.call('GET', KEYS[1])
if not held then
  return {'dead'}
end
local known = string.match(held, '^%d+')
if tonumber(known) < tonumber(ARGV[2]) then
  return {'forgotten', known}
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return {'ok'}
