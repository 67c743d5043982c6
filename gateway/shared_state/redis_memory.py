"""Whether Redis still knows what it was told: a flush, a restart and a failover make it forget.

A mark stands in Redis, and each gateway remembers it. Where the mark is another one or gone, what the gateways hold has
to be told again; until each had the time to do so, nobody is given what somebody else may hold.
"""

from typing import Final

from gateway.shared_state.redis import PREFIX

MEMORY: Final = f"{PREFIX}:memory"
"""The key of the mark."""
SETTLE: Final = 5.0
"""Seconds that gateways have to tell again what they hold: more than two signs of life are apart."""

# A gateway that has seen no mark yet (an empty one) cannot tell a flush from a Redis that is new.
IS_SETTLING: Final = f"""
local function is_settling(key, mark)
  local held = redis.call('HMGET', key, 'since', 'is_loss')
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  if not held[1] then
    if mark == '' then return false end
    redis.call('HSET', key, 'since', string.format('%.0f', now), 'is_loss', '1')
    return true
  end
  return held[2] == '1' and now - tonumber(held[1]) < {SETTLE * 1000:.0f}
end
"""
"""A function for scripts: whether what Redis does not know may be held all the same."""

# ARGV: the mark that is known. Redis tells by its run id that it is another process than the one that was told.
LOOK: Final = """
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
local held = redis.call('HMGET', KEYS[1], 'run', 'since')
if not held[2] or (held[1] and held[1] ~= run) then
  local time = redis.call('TIME')
  local is_loss = (held[2] or ARGV[1] ~= '') and '1' or '0'
  held[2] = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
  redis.call('HSET', KEYS[1], 'since', held[2], 'is_loss', is_loss)
end
redis.call('HSET', KEYS[1], 'run', run)
return run .. ' ' .. held[2]
"""
"""A script that returns the mark, and sets a new one where Redis lost the old one."""
