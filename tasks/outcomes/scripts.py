"""The scripts (Lua) that change outcomes, claims and counters: each is atomic, since Redis runs one script at a time.

A script reads the first bytes of an outcome only, its header (`tasks.messages.pack_outcome`), and never the msgpack
behind it.
"""

from __future__ import annotations

_ANSWERS = """
local function answers(header, attempt)
  if string.sub(header, 1, 1) == 'R' then return true end
  local failed = tonumber(string.match(header, '^F(%d+);'))
  return failed ~= nil and failed >= attempt
end
local function header(key) return redis.call('GETRANGE', key, 0, 15) end
"""

CLAIM = (
    _ANSWERS
    + """
local token, claim_ms, starts_ms, deadline_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > deadline_ms then return 'expired' end
local found = {}
for i = 1, #KEYS / 3 do
  local outcome, claim, starts = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
  if answers(header(outcome), tonumber(ARGV[4 + i])) then
    found[i] = -1
  elseif redis.call('SET', claim, token, 'NX', 'PX', claim_ms) then
    found[i] = redis.call('HINCRBY', starts, 'starts', 1)
    redis.call('PEXPIRE', starts, starts_ms)
  elseif redis.call('GET', claim) == token then
    found[i] = tonumber(redis.call('HGET', starts, 'starts') or '1')
  else
    found[i] = 0
  end
end
return found
"""
)
"""KEYS: outcome, claim, starts for each sample. ARGV: token, claim ms, starts ms, deadline ms, attempt of each sample.
For each: -1 answered, 0 claimed by another, n claimed by us for the n-th start."""

WRITE = (
    _ANSWERS
    + """
local token, ttl_ms, only_claimed = ARGV[1], ARGV[2], ARGV[3] == '1'
local written = 0
for i = 1, #KEYS / 3 do
  local outcome, claim, starts, value = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i], ARGV[3 + i]
  local is_ours = redis.call('GET', claim) == token
  if is_ours or not only_claimed then
    local new = string.sub(value, 1, 16)
    local old = header(outcome)
    local attempt = tonumber(string.match(new, '^F(%d+);'))
    local keep = string.sub(old, 1, 1) == 'R' or (attempt ~= nil and answers(old, attempt))
    if not keep then
      redis.call('SET', outcome, value, 'PX', ttl_ms)
      written = written + 1
    end
    if is_ours then redis.call('DEL', claim) end
    redis.call('DEL', starts)
  end
end
return written
"""
)
"""KEYS as for a claim. ARGV: token, outcome ms, 1 to leave out samples that the token does not claim, outcome of each
sample. Returns how many were new."""

RELEASE = """
for i = 1, #KEYS / 2 do
  local claim, starts = KEYS[2 * i - 1], KEYS[2 * i]
  if redis.call('GET', claim) == ARGV[1] then
    redis.call('DEL', claim)
    if redis.call('HGET', starts, 'alone_by') == ARGV[1] then
      redis.call('HDEL', starts, 'alone_by')
      redis.call('HINCRBY', starts, 'alone', -1)
    end
    if redis.call('HINCRBY', starts, 'starts', -1) <= 0 then redis.call('DEL', starts) end
  end
end
"""
"""KEYS: claim, starts for each sample. ARGV: token. Gives claims back as if they had never been."""

START_ALONE = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local earlier = tonumber(redis.call('HGET', KEYS[1], 'alone') or '0')
local since_ms = now_ms - tonumber(redis.call('HGET', KEYS[1], 'first_alone_ms') or now_ms)
if redis.call('HGET', KEYS[1], 'alone_by') == ARGV[2] then
  earlier = earlier - 1
elseif earlier < tonumber(ARGV[1]) then
  redis.call('HINCRBY', KEYS[1], 'alone', 1)
  redis.call('HSET', KEYS[1], 'alone_by', ARGV[2])
  redis.call('HSETNX', KEYS[1], 'first_alone_ms', now_ms)
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return {earlier, since_ms}
"""
"""KEYS: starts. ARGV: most starts alone, token, starts ms. Counts a start alone, once for a token, unless there were as
many. Returns the number of earlier starts alone, and ms since the first of them."""

EXTEND = """
local kept = 0
for i = 1, #KEYS / 2 do
  local claim, outcome, token = KEYS[2 * i - 1], KEYS[2 * i], ARGV[1 + i]
  local holder = redis.call('GET', claim)
  if holder == token then
    redis.call('PEXPIRE', claim, ARGV[1])
    kept = kept + 1
  elseif not holder and redis.call('EXISTS', outcome) == 0 then
    redis.call('SET', claim, token, 'PX', ARGV[1])
    kept = kept + 1
  end
end
return kept
"""
"""KEYS: claim, outcome for each sample. ARGV: ms, then the token of each. Returns how many are ours. A claim that
expired while its worker could not reach Redis, or was stopped, is ours again if nobody has claimed or answered it
since."""

NUMBER = """
local last = redis.call('INCRBY', KEYS[1], ARGV[1])
local first = last - tonumber(ARGV[1]) + 1
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', redis.call('GET', KEYS[3]) or '0')
local from, newest = first, redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if newest[1] and tonumber(newest[2]) == first - 1 then
  local number, run = string.match(newest[1], '^(%d+)|(.*)$')
  if run == ARGV[2] then
    redis.call('ZREM', KEYS[2], newest[1])
    from = number
  end
end
redis.call('ZADD', KEYS[2], last, from .. '|' .. ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return first
"""
"""KEYS: the queue's counter, its senders, its consumed offset. ARGV: how many messages, of which run, ms that the list
of senders lives. Returns the number of the first. What was taken leaves the list; messages of one run that follow one
another are one entry."""

TAKE = """
local number = tonumber(ARGV[1])
local sent = tonumber(redis.call('GET', KEYS[2]) or '0')
local consumed = tonumber(redis.call('GET', KEYS[1]) or '0')
if number > 0 and number <= sent and (consumed < number or consumed > sent) then
  redis.call('SET', KEYS[1], ARGV[1])
end
local time = redis.call('TIME')
return time[1] * 1000 + math.floor(time[2] / 1000)
"""
"""KEYS: the queue's consumed offset, its counter of messages sent. ARGV: the number of a message that was taken.
Returns Redis's clock in ms. A number that no client has counted moves nothing, and an offset beyond the counter comes
back: else one message with a number of its own would pass for the last of its queue for good."""

BEAT = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[1], 60 * ARGV[3])
"""
"""KEYS: the workers, this worker. ARGV: its node name, its heartbeat, ms."""
