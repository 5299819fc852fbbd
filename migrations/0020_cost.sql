-- What is done costs what it touches, however much is finished, held, or asleep.

-- What a settle puts into `tasker.due` for a task that ends goes with it. Only hints that outlast
-- what they are about are in this index: a claim and a retry, which most steps come to, are not.
create index due_by_task on tasker.due (task_uuid, step_uuids) where kind <> all ('{lease,retry,schedule}');

-- Removes hints that nothing will come of: their task or their step has ended, or is gone. Settles
-- of this release leave none; those of an older one do. It reads every hint, and a task and a step for
-- each; answers how many it removed.
create function tasker.forget_due(p_max int) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_nestloop = on
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_removed bigint;
begin
  delete from tasker.due d where d.due_id = any(array(
    select o.due_id from tasker.due o
    left join tasker.tasks t on t.task_uuid = o.task_uuid and t.finished_at is null
    left join tasker.steps s on s.step_uuid = o.step_uuids[1] and cardinality(o.step_uuids) = 1
      and s.state in ('complete', 'error', 'cancelled', 'skipped', 'resolved_manually')
    where o.task_uuid is not null and (t.task_uuid is null or s.step_uuid is not null)
    limit p_max));
  get diagnostics v_removed = row_count;
  return v_removed;
end
$$;
select tasker.forget_due(2147483647);

-- Held steps are found by queue and handler: what no worker offers is not walked over. A settle
-- writes the handler when it holds the step, so that an ordinary step's updates stay HOT. Steps
-- that an older release holds have none, and are looked at one by one.
alter table tasker.steps add column held_handler text;
update tasker.steps s set held_handler = d.handler
from tasker.tasks t join tasker.template_steps d on d.template_id = t.template_id
where s.held_by is not null and s.lane is null and t.task_uuid = s.task_uuid and d.step_index = s.step_index;
create index steps_held_by_handler on tasker.steps (queue, held_handler, priority desc, ready_at)
  where held_by is not null and lane is null;
drop index tasker.steps_held;

create or replace function tasker.held_steps(p_queue text, p_handlers text[], p_max int)
returns table (task_uuid uuid, step_uuid uuid, priority int, ready_at timestamptz, handler text)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select f.task_uuid, f.step_uuid, f.priority, f.ready_at, f.handler
  from (
    select h.*, o.handler from (select distinct u from unnest(p_handlers) u) o(handler)
    cross join lateral (
      select s.task_uuid, s.step_uuid, s.priority, s.ready_at
      from tasker.steps s join tasker.tasks t on t.task_uuid = s.task_uuid
      where s.queue = p_queue and s.held_handler = o.handler and s.held_by is not null and s.lane is null and t.state <> 'suspended'
      order by s.priority desc, s.ready_at limit greatest(p_max, 0)) h
    union all
    (select s.task_uuid, s.step_uuid, s.priority, s.ready_at, d.handler
     from tasker.steps s
     join tasker.tasks t on t.task_uuid = s.task_uuid
     join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
     where s.queue = p_queue and s.held_handler is null and s.held_by is not null and s.lane is null
       and d.handler = any(p_handlers) and t.state <> 'suspended'
     order by s.priority desc, s.ready_at limit greatest(p_max, 0))
  ) f
  order by f.priority desc, f.ready_at limit greatest(p_max, 0)
$$;

-- Why a row of `tasker.workers` is of no use, or null: nothing is sent on its account. The constraints of
-- 0017 refuse such a row; who reads them for everybody must not fail even where one was dropped.
create function tasker.worker_problem(p_namespace text, p_queues text[], p_handlers text[], p_slots int) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select case
    when coalesce(p_slots, -1) < 0 then format('slots: must be 0 at least, not %s', coalesce(p_slots::text, 'null'))
    when cardinality(array_remove(p_handlers, null)) > 0 is not true then 'handlers: names none; it could run nothing'
    when cardinality(array_remove(p_queues, null)) > 0 is not true then 'queues: names none; it could read nothing'
    else (
      select format('queues: %s is no queue of steps of namespace %s', left(q, 60), left(p_namespace, 40)) from unnest(p_queues) q
      where q is not null and tasker.queue_namespace(q) is distinct from p_namespace limit 1)
  end
$$;

-- As before, but it counts what it can of each worker and passes over the rest: a queue that is not of
-- the worker's namespace, holds no steps or does not exist, and handlers and slots that are none.
-- What is held is asked by one probe a handler.
create or replace function tasker.room() returns table (queue text, capacity bigint, room bigint, handlers text[], holding boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v record;
  v_depth bigint;
  v_count text;
begin
  for v in
    with live as materialized (
      select q.queue, w.handlers, least(greatest(w.slots, 0), 10000) as slots
      from tasker.workers w cross join lateral (select distinct u from unnest(w.queues) u) q(queue)
      where w.seen_at > clock_timestamp() - interval '30 s' and tasker.queue_namespace(q.queue) = w.namespace
    )
    select l.queue, least(sum(l.slots), 100000)::bigint as slots,
      (select array_agg(distinct h) from live o, unnest(o.handlers) h where o.queue = l.queue and h is not null) as handlers
    from live l group by l.queue
  loop
    if v.handlers is null or to_regclass(format('pgmq.%I', 'q_' || v.queue)) is null then
      continue;
    end if;
    v_count := format('select count(*) from (select from pgmq.%I where message->>''handler'' = any($1) limit $2) d', 'q_' || v.queue);
    execute v_count into v_depth using v.handlers, v.slots * 2;
    if v_depth >= v.slots * 2 and tasker.drop_dead_messages(v.queue, v.handlers, '1 s', 1000) > 0 then
      execute v_count into v_depth using v.handlers, v.slots * 2;
    end if;
    return query select v.queue, v.slots * 2, v.slots * 2 - v_depth, v.handlers,
      -- What no live worker offers waits by itself and holds up nobody else.
      exists (select from unnest(v.handlers) h where exists (
          select from tasker.steps s where s.queue = v.queue and s.held_handler = h and s.held_by is not null and s.lane is null))
        or exists (select from tasker.steps s
                   where s.queue = v.queue and s.held_handler is null and s.held_by is not null and s.lane is null)
        or exists (select from tasker.steps s where s.queue = v.queue and s.held_by is not null and s.lane is not null);
  end loop;
end
$$;

-- Only queues of steps have messages of attempts; whatever else it is asked about it leaves alone.
create or replace function tasker.drop_dead_messages(p_queue text, p_handlers text[], p_older interval, p_max int) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_dropped int;
begin
  if tasker.queue_namespace(p_queue) is null then
    return 0;
  end if;
  execute format($q$
    with old as materialized (
      select q.msg_id, (q.message->>'step')::uuid as step, (q.message->>'attempt')::int as attempt from pgmq.%1$I q
      where q.enqueued_at < clock_timestamp() - $2 and ($1 is null or q.message->>'handler' = any($1))
        and case when tasker.is_uuid(q.message->>'step') and q.message->>'attempt' ~ '^[0-9]{1,9}$' then q.message->>'v' = '1' end
      order by q.msg_id limit $3
    ), dead as (
      select q.msg_id from pgmq.%1$I q
      where q.msg_id = any(array(
          select o.msg_id from old o where not exists (
            select from tasker.steps s where s.step_uuid = o.step and s.state = 'enqueued' and s.attempt = o.attempt)))
      for update skip locked
    )
    delete from pgmq.%1$I q where q.msg_id = any(array(select d.msg_id from dead d))
  $q$, 'q_' || p_queue) using p_handlers, p_older, p_max;
  get diagnostics v_dropped = row_count;
  return v_dropped;
end
$$;

-- The steps of unfinished tasks that somebody must move, planned by itself, with the indexes of the tables:
-- what is open is few among what is finished. `child_ended`: what it started moves it no more.
create function tasker.steps_to_move()
returns table (task_uuid uuid, step_uuid uuid, attempt int, state text, due_at timestamptz, is_held boolean, child_ended boolean)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_nestloop = on
set jit = off
as $$
  select s.task_uuid, s.step_uuid, s.attempt, s.state, s.due_at, s.held_by is not null,
    -- A task that it started moves it when it ends, by a message in the same transaction.
    s.state = 'waiting' and exists (select from tasker.children c
      where c.task_uuid = s.task_uuid and c.step_uuid = s.step_uuid and c.attempt = s.attempt
        and not (c.awaited and exists (select from tasker.tasks k where k.task_uuid = c.child_uuid and k.finished_at is null)))
  from tasker.tasks t join tasker.steps s on s.task_uuid = t.task_uuid
  where t.finished_at is null
    and (s.held_by is not null
      or s.state not in ('pending', 'complete', 'error', 'cancelled', 'skipped', 'resolved_manually')
      -- Whatever it depends on is done, so whoever did the last of it has sent or held it.
      or (s.state = 'pending' and s.remaining_dependencies = 0))
$$;

-- Promise 4: every step that somebody must move holds a progress token of its own: a message, a live
-- claim, a due time or a declared wait; and so does a task that has no such step yet. One row for each
-- task that has not, or of which one step has not, whatever its other steps have. This looks at
-- everything that is unfinished and belongs in a check, not in a loop. What it compares are lists whose
-- lengths nobody knows beforehand: as nested loops 100,000 timers would be compared with 100,000 steps,
-- and sessions of the hot path know no others. (It is stable: all its statements see one moment.)
create or replace function tasker.stuck_tasks() returns table (task_uuid uuid, state text, since timestamptz, why text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set enable_hashjoin = on
set enable_mergejoin = on
set enable_seqscan = on
set jit = off
as $$
#variable_conflict use_column
declare
  v_queue text;
  -- The attempts of which there is a message, as text: <step>/<attempt>.
  v_queued text[] := '{}';
  v_some text[];
begin
  for v_queue in select queue_name from pgmq.meta where queue_name like 'worker\_%' loop
    execute format($q$ select array_agg(lower(message->>'step') || '/' || (message->>'attempt')) from pgmq.%I $q$, 'q_' || v_queue)
    into v_some;
    v_queued := v_queued || coalesce(v_some, '{}');
  end loop;
  return query
  with requested as (
    select (message->>'task')::uuid as task_uuid from pgmq.q_task_requests where tasker.is_uuid(message->>'task')
  ), started as (
    select d.task_uuid from tasker.due d where d.kind = 'start'
  ), sent as (
    select unnest(v_queued) as token
    union
    select 'result of ' || lower(message->>'step') || '/' || (message->>'attempt') from pgmq.q_step_results
    union
    -- Other hints move a step to its end, but nothing before.
    select d.kind || ' of ' || u.step_uuid from tasker.due d cross join lateral unnest(d.step_uuids) u(step_uuid)
    where d.kind in ('lease', 'retry', 'timer')
  ), open as materialized (
    select o.task_uuid, o.step_uuid, o.child_ended,
      case
        when o.is_held or (o.state = 'waiting' and o.due_at is null) then null
        when o.state = 'enqueued' then o.step_uuid || '/' || o.attempt
        when o.state in ('enqueued_for_orchestration', 'enqueued_as_error_for_orchestration')
          then 'result of ' || o.step_uuid || '/' || o.attempt
        when o.state = 'in_progress' then 'lease of ' || o.step_uuid
        when o.state = 'waiting_for_retry' then 'retry of ' || o.step_uuid
        when o.state = 'waiting' then 'timer of ' || o.step_uuid
        else 'none' end as needs
    from tasker.steps_to_move() o
  ), looked as (
    select o.task_uuid, o.step_uuid, o.child_ended or (o.needs is not null and n.token is null) as is_dead
    from open o left join sent n on n.token = o.needs
  ), task as (
    select l.task_uuid, (array_agg(l.step_uuid) filter (where l.is_dead))[1] as dead_step from looked l group by l.task_uuid
  )
  select t.task_uuid, t.state, t.last_at, coalesce(
    (select format('step %s is %s, and there is ', d.name || case when s.item >= 0 then format('[%s]', s.item) else '' end, s.state)
     from tasker.steps s join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
     where s.step_uuid = l.dead_step), '') || 'no message, claim, due time or declared wait'
  from tasker.tasks t left join task l on l.task_uuid = t.task_uuid
  where t.finished_at is null and t.state not in ('suspended', 'blocked_by_failures')
    and (l.task_uuid is null or l.dead_step is not null)
    and not exists (select from requested q where q.task_uuid = t.task_uuid)
    and not exists (select from started q where q.task_uuid = t.task_uuid);
end
$$;
drop function tasker.open_steps();

create or replace view tasker.task_expiry as
select t.task_uuid, case when o.namespace is null then a.archive else o.archive end as archive,
  coalesce(t.state in ('complete', 'error', 'cancelled', 'resolved_manually')
    and t.finished_at < statement_timestamp() - case when o.namespace is null then a.keep else o.keep end
    and t.finished_at < (select coalesce(min(b.at), 'infinity') from tasker.export_batches b)
    -- (Not `exists`: that may be answered from a hash of every open task.)
    and (t.parent_task_uuid is null
      or (select p.finished_at is not null from tasker.tasks p where p.task_uuid = t.parent_task_uuid) is not false), false) as expired,
  t.template_id
from tasker.tasks t
left join tasker.retention o on o.namespace = t.namespace
left join tasker.retention a on a.namespace = '*';

-- Walks the tasks of every template whose namespace has a policy, a template after the other, in the order
-- they were created: up to `p_scan` of them, each read once. What is kept for ever, what is too young, and
-- what was created after the oldest open batch, of which nothing may go, is not read. The answer is where
-- to go on; null when the walk is done. (`tasker.expired_tasks` walks for older releases.)
create function tasker.expired_by_template(
  p_template int, p_after uuid, p_scan int, p_archiving boolean,
  out tasks uuid[], out next_template int, out next_after uuid
)
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_unacknowledged uuid := (select tasker.uuid7_floor(min(b.at)) from tasker.export_batches b);
  v_left int := p_scan;
  v      record;
  v_seen uuid[];
  v_gone uuid[];
begin
  tasks := '{}';
  for v in
    select r.template_id, tasker.uuid7_floor(clock_timestamp() - r.keep) as horizon
    from (
      select p.template_id, case when o.namespace is null then a.keep else o.keep end as keep,
        case when o.namespace is null then a.archive else o.archive end as archive
      from tasker.templates p
      left join tasker.retention o on o.namespace = p.namespace
      left join tasker.retention a on a.namespace = '*'
      where p.template_id >= p_template) r
    where r.keep is not null and (p_archiving or not r.archive)
    order by r.template_id
  loop
    with seen as materialized (
      select e.task_uuid, e.expired and (p_archiving or not e.archive) as goes from tasker.task_expiry e
      where e.template_id = v.template_id and e.task_uuid < least(v.horizon, v_unacknowledged)
        and e.task_uuid > case when v.template_id = p_template then p_after else '00000000-0000-0000-0000-000000000000' end
      order by e.task_uuid limit v_left
    )
    select array_agg(s.task_uuid order by s.task_uuid), array_agg(s.task_uuid order by s.task_uuid) filter (where s.goes)
    into v_seen, v_gone from seen s;
    tasks := tasks || coalesce(v_gone, '{}');
    v_left := v_left - coalesce(cardinality(v_seen), 0);
    if v_left <= 0 then
      next_template := v.template_id;
      next_after := v_seen[cardinality(v_seen)];
      return;
    end if;
  end loop;
end
$$;
-- As before, but both sides of the join are bounded: else a plan may read every task to compare it.
create or replace function tasker.lock_expired(p_tasks uuid[], p_archiving boolean) returns uuid[]
language sql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
  select coalesce(array_agg(l.task_uuid), '{}') from (
    select t.task_uuid from tasker.tasks t join tasker.task_expiry e on e.task_uuid = t.task_uuid
    where t.task_uuid = any(p_tasks) and e.task_uuid = any(p_tasks) and e.expired and (p_archiving or not e.archive)
    order by t.task_uuid for update of t skip locked) l
$$;

-- As before, but no table is read for rows that are not theirs. Of `due` only the hints that are found
-- by their task: a claim's and a retry's go by themselves when their time comes.
create or replace function tasker.remove_tasks(p_tasks uuid[], p_weeks text[] default '{}') returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_table   text;
  v_logged  uuid[];
  v_removed bigint;
begin
  select coalesce(array_agg(t), '{}') into v_logged from unnest(p_tasks) t
  where not exists (select from tasker.log_weeks() w where w.suffix = any(p_weeks) and t >= w.from_uuid and t < w.to_uuid);
  -- First the few that are theirs: joined in one, a plan may read every key to find its task.
  with theirs as materialized (
    select t.namespace, t.idempotency_key, t.task_uuid from tasker.tasks t
    where t.task_uuid = any(p_tasks) and t.idempotency_key is not null
  )
  delete from tasker.idempotency_keys k using theirs t
  where k.namespace = t.namespace and k.key = t.idempotency_key and k.task_uuid = t.task_uuid;
  delete from tasker.due where task_uuid = any(p_tasks) and kind <> all ('{lease,retry,schedule}');
  for v_table in
    select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'task_uuid' and not a.attisdropped
    where c.relnamespace = 'tasker'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
      and c.relname not in ('audit', 'tasks', 'idempotency_keys', 'due') order by c.relname
  loop
    execute format('delete from tasker.%I where task_uuid = any($1)', v_table)
    using case when v_table in ('transitions', 'attempts') then v_logged else p_tasks end;
  end loop;
  delete from tasker.tasks where task_uuid = any(p_tasks);
  get diagnostics v_removed = row_count;
  return v_removed;
end
$$;

-- A disabled scan costs so much on paper that a session which allows it compiles the plan: half a second.
-- Our own sessions do not; people's do.
alter function tasker.oldest_rows() set jit = off;
alter function tasker.expired_weeks(boolean) set jit = off;

-- Quarantined messages are counted, and listed, by their queue.
create index quarantine_by_queue on tasker.quarantine (queue, quarantine_id);

revoke all on function tasker.forget_due, tasker.expired_by_template, tasker.worker_problem, tasker.steps_to_move from public;
