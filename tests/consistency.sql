-- What must hold whenever nobody is in the middle of a transaction: one row of words per
-- thing that does not.
with counted as (
  select t.task_uuid, t.state, t.version, t.open_steps, t.in_flight_steps, t.retrying_steps, t.held_steps,
    count(s.*) filter (where s.state not in ('complete', 'error', 'cancelled', 'skipped', 'resolved_manually')) as open,
    count(s.*) filter (where s.state in ('enqueued', 'in_progress', 'enqueued_for_orchestration', 'enqueued_as_error_for_orchestration')) as in_flight,
    count(s.*) filter (where s.state = 'waiting_for_retry') as retrying,
    count(s.*) filter (where s.held_by is not null or s.state = 'waiting') as held
  from tasker.tasks t left join tasker.steps s on s.task_uuid = t.task_uuid
  group by t.task_uuid
), open_parents as (
  select s.task_uuid, s.step_uuid, s.step_index, s.state, s.remaining_dependencies, s.skipped_dependencies,
    -- What an operator skipped is done for those behind it.
    count(p.*) filter (where p.state = 'skipped' and not exists (
      select from tasker.transitions r where r.task_uuid = p.task_uuid and r.entity_uuid = p.step_uuid
        and r.version = p.version and r.actor is not null)) as skipped,
    count(p.*) filter (where p.state not in ('complete', 'resolved_manually', 'skipped')
      and not (p.state = 'error' and coalesce(d.definition->'steps'->p.step_index->'retry'->>'on_exhausted', '') = 'continue')) as remaining
  from tasker.steps s
  join tasker.tasks t on t.task_uuid = s.task_uuid
  join tasker.templates d on d.template_id = t.template_id
  left join tasker.template_edges e on e.template_id = t.template_id and e.child_index = s.step_index
  left join tasker.steps p on p.task_uuid = s.task_uuid and p.step_index = e.parent_index and p.item = -1
  where s.state not in ('error', 'cancelled')
    -- Once a step has left pending, a join has all it waits for and counts no more.
    and (s.state = 'pending' or coalesce(d.definition->'steps'->s.step_index->>'join', 'all') = 'all')
    and s.state <> 'skipped' and s.item = -1
    -- A step that was settled by hand counts no more either.
    and not exists (select from tasker.transitions r where r.task_uuid = s.task_uuid and r.entity_uuid = s.step_uuid
      and r.version = s.version and r.event in ('ResolveManually', 'CompleteManually'))
  group by s.step_uuid
), entity as (
  select t.task_uuid, t.task_uuid as entity_uuid, t.state, t.version from tasker.tasks t
  union all
  select s.task_uuid, s.step_uuid, s.state, s.version from tasker.steps s
), chain as (
  select r.*, lag(r.to_state) over w as before_state, lag(r.version) over w as before_version, lag(r.at) over w as before_at,
    lead(r.version) over w is null as is_last
  from tasker.transitions r window w as (partition by r.task_uuid, r.entity_uuid order by r.version)
)
select format('task %s is %s and counts %s, but has %s (open, in flight, retrying, held)', task_uuid, state,
  (open_steps, in_flight_steps, retrying_steps, held_steps), (open, in_flight, retrying, held)) as problem
from counted
where (open_steps, in_flight_steps, retrying_steps, held_steps) is distinct from (open, in_flight, retrying, held)
union all
select format('step %s of task %s is %s with %s dependencies left and %s skipped, but %s parents are open and %s skipped',
  step_index, task_uuid, state, remaining_dependencies, skipped_dependencies, remaining, skipped)
from open_parents where (remaining_dependencies, skipped_dependencies) <> (remaining, skipped)
union all
select format('map %s is %s with %s items, of which %s were created, %s are left and %s failed, but has %s, %s and %s', m.step_uuid, s.state,
  m.items, m.next_item, m.remaining_items, m.failed_items, i.created, i.remaining, i.failed)
from tasker.maps m join tasker.steps s on s.step_uuid = m.step_uuid
cross join lateral (
  select count(*) as created, m.items - count(*) filter (where i.state in ('complete', 'error')) as remaining,
    count(*) filter (where i.state = 'error') as failed
  from tasker.steps i where i.task_uuid = m.task_uuid and i.step_index = s.step_index
    -- What is left of an earlier, longer list is no item of it.
    and i.item between 0 and m.next_item - 1) i
where (m.next_item, m.remaining_items, m.failed_items) <> (i.created, i.remaining, i.failed)
union all
select format('entity %s: row %s of the log goes %s -> %s at %s, after row %s went to %s at %s', entity_uuid, version,
  from_state, to_state, at, before_version, before_state, before_at)
from chain
where began_at > at or version <> coalesce(before_version, 0) + 1
   or (before_version is not null and (from_state <> before_state or at < before_at))
union all
select format('entity %s is %s at version %s, but its log ends as %s at %s', e.entity_uuid, e.state, e.version, c.to_state, c.version)
from entity e left join chain c on c.task_uuid = e.task_uuid and c.entity_uuid = e.entity_uuid and c.is_last
where (c.version is null and e.version > 0) or c.version <> e.version or c.to_state <> e.state
union all
select format('step %s: %s %s rows of attempt %s', entity_uuid, count(*), event, attempt)
from tasker.transitions where event in ('Claim', 'Report', 'Complete') group by entity_uuid, event, attempt having count(*) > 1
union all
select format('step %s completed %s times in generation %s', entity_uuid, count(*), generation)
from tasker.transitions where event = 'Complete' group by entity_uuid, generation having count(*) > 1
union all
select format('step %s is enqueued twice as attempt %s', entity_uuid, attempt)
from tasker.transitions where to_state = 'enqueued' and event <> 'LeaseExpired' group by entity_uuid, attempt having count(*) > 1
union all
select format('limit %s allows %s at once, but %s are in flight under it', l.name, l.concurrency, count(*))
from tasker.limits l join tasker.places p using (limit_id) join tasker.steps s on s.step_uuid = p.step_uuid
where tasker.is_in_flight(s.state)
group by l.limit_id having count(*) > l.concurrency
union all
select format('task %s goes on, and step %s, which started it as attempt %s and awaited it, is %s as attempt %s', c.child_uuid, c.step_uuid,
  c.attempt, s.state, s.attempt)
from tasker.children c join tasker.tasks k on k.task_uuid = c.child_uuid and k.finished_at is null
join tasker.steps s on s.step_uuid = c.step_uuid
where c.awaited and (s.state, s.attempt) <> ('waiting', c.attempt)
  and not exists (select from pgmq.q_task_requests q where q.message->>'type' = 'cancel' and q.message->>'task' = c.child_uuid::text)
union all
-- A retry is found by its time: one that is being looked at right now has been put off for a moment.
select format('task %s has ended as %s, and a %s is due for it at %s', t.task_uuid, t.state, d.kind, d.due_at)
from tasker.due d join tasker.tasks t on t.task_uuid = d.task_uuid
where t.finished_at is not null and d.kind <> 'lease' and (d.kind <> 'retry' or d.due_at > clock_timestamp() + interval '6 s')
union all
select format('step %s has ended as %s, and a %s is due for it at %s', s.step_uuid, s.state, d.kind, d.due_at)
from tasker.due d join tasker.steps s on d.step_uuids = array[s.step_uuid]
where d.task_uuid is not null and s.state in ('complete', 'error', 'cancelled', 'skipped', 'resolved_manually')
  and d.kind <> 'lease' and (d.kind <> 'retry' or d.due_at > clock_timestamp() + interval '6 s')
