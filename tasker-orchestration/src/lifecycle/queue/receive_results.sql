with picked as materialized (
  select msg_id from pgmq.q_step_results where vt <= clock_timestamp() order by msg_id limit $2 for update skip locked
), taken as (
  update pgmq.q_step_results m
  set vt = clock_timestamp() + make_interval(secs => $1), read_ct = m.read_ct + 1
  -- An array and not a join: a plan made while the queue was empty compared each row with each.
  where m.msg_id = any(array(select p.msg_id from picked p))
  returning m.msg_id, m.read_ct, m.enqueued_at, m.message, m.headers
), marked as (
  -- Behind a lone message there is hardly another: who takes it is woken by the next.
  update tasker.readers r set asleep = n.few, seen_at = clock_timestamp()
  from (select count(*) < least($2, 2) as few from picked) n
  where r.queue = 'step_results' and r.reader = $3 and r.asleep <> n.few
)
select msg_id as "msg_id!", read_ct as "read_ct!", enqueued_at as "enqueued_at!",
  message::text as "message", headers::text as "headers"
from taken
