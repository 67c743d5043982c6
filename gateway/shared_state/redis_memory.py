"""Whether Redis still knows what it was told: a flush, a restart and a failover make it forget.

A mark stands in Redis, and each gateway remembers it. Where the mark is another one or gone, or Redis is another
process than the one that was told (after a failover, or from an older snapshot), what the gateways hold has to be told
again; until each had the time to do so, nobody is given what somebody else may hold. The same holds for leases that
ended while nobody could reach Redis, as it stood still or its network was gone: nobody could renew them either.
"""

from typing import Final

from gateway.shared_state.redis import PREFIX

MEMORY: Final = f"{PREFIX}:memory"
"""The key of the mark."""
SETTLE: Final = 5.0
"""Seconds that gateways have to tell again what they hold: more than two signs of life are apart."""
STOOD: Final = 4.0
"""Seconds in which no gateway was heard, after which Redis counts as having stood still: two signs of life are lost."""

LOOKING: Final = f"""
local function look(key, mark, is_first)
  local info = redis.pcall('INFO', 'server')
  local run = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local text = string.format('%.0f', now)
  local held = redis.call('HMGET', key, 'run', 'since', 'is_loss', 'seen', 'woke')
  local function is_lately(at)
    return at and now >= tonumber(at) and now - tonumber(at) < {SETTLE * 1000:.0f}
  end
  if not held[2] and mark == '' and not is_first then return {{now = now}} end
  if not held[2] or held[1] ~= run then
    held[3] = (held[2] or mark ~= '') and '1' or '0'
    held[2] = text
    redis.call('HSET', key, 'run', run, 'since', text, 'is_loss', held[3])
  elseif math.abs(now - tonumber(held[4])) > {STOOD * 1000:.0f} then
    held[5] = text
    redis.call('HSET', key, 'woke', text)
  end
  redis.call('HSET', key, 'seen', text)
  return {{
    now = now,
    mark = run .. ' ' .. held[2],
    forgot = held[3] == '1' and is_lately(held[2]),
    stood_still = is_lately(held[5]),
  }}
end
"""
"""A function for scripts: the time in milliseconds, the mark, and whether Redis ``forgot`` or ``stood_still`` lately.

A gateway that has seen no mark yet (an empty one) cannot tell a flush from a Redis that is new: it sets no mark unless
it ``is_first``, and asks for nothing else.
"""

# ARGV: the mark that is known.
LOOK: Final = (
    LOOKING
    + """
return look(KEYS[1], ARGV[1], true).mark
"""
)
"""A script that returns the mark, and sets a new one where Redis lost the old one."""
