-- What is due. Called by sweep alone.

-- Takes due hints and puts them off by `p_vt`, as a queue read does: whoever settles one
-- deletes it in the same transaction, and if nobody does it comes back. Leases that were
-- renewed meanwhile cost one update here and no lock on any task.
create function tasker.take_due(p_max int, p_vt interval default '5 s')
returns table (due_id bigint, kind text, task_uuid uuid, step_uuid uuid)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_ids bigint[];
begin
  v_ids := array(select d.due_id from tasker.due d where d.due_at <= v_now
                 order by d.due_at limit p_max for update skip locked);
  if cardinality(v_ids) = 0 then
    return;
  end if;

  return query
  with hint as materialized (
    select d.due_id, d.kind, d.task_uuid, d.step_uuids from tasker.due d where d.due_id = any(v_ids)
  ), claim as materialized (
    select h.due_id, s.claimed_by as worker, s.step_uuid, s.task_uuid, s.lease_expires_at as looks_at,
      s.lease_expires_at <= v_now
        or coalesce(s.last_at + make_interval(secs => (ts.run_ms + ts.heartbeat_ms) / 1000.0) <= v_now, false) as expired
    from hint h cross join lateral unnest(h.step_uuids) u(step_uuid)
    join tasker.steps s on s.step_uuid = u.step_uuid and s.state = 'in_progress'
    join tasker.tasks t on t.task_uuid = s.task_uuid
    join tasker.template_steps ts on ts.template_id = t.template_id and ts.step_index = s.step_index
    where h.kind = 'lease'
  ), renewed as (
    insert into tasker.due (due_at, kind, worker, step_uuids)
    select min(c.looks_at), 'lease', c.worker, array_agg(c.step_uuid) from claim c where not c.expired group by c.due_id, c.worker
  ), ended as (
    -- One claim takes steps of many tasks. Each has a row of its own from here on: whoever settles
    -- one task deletes its row, and must not delete that of another, which may be locked meanwhile.
    insert into tasker.due (due_at, kind, worker, step_uuids)
    select v_now + p_vt, 'lease', c.worker, array[c.step_uuid] from claim c where c.expired
    returning due.due_id, due.step_uuids
  ), gone as (
    delete from tasker.due d using hint h
    -- The ids once more: a plan made while hardly anything was due would compare all that is with each.
    where d.due_id = any(v_ids) and d.due_id = h.due_id and h.kind = 'lease'
  ), later as (
    update tasker.due d set due_at = v_now + p_vt
    from hint h
    where d.due_id = any(v_ids) and d.due_id = h.due_id and h.kind <> 'lease'
  )
  select o.due_id, 'lease', c.task_uuid, c.step_uuid
  from ended o join claim c on c.expired and c.step_uuid = o.step_uuids[1]
  union all
  select h.due_id, h.kind, coalesce(h.task_uuid, s.task_uuid), u.step_uuid
  from hint h left join lateral unnest(h.step_uuids) u(step_uuid) on true
  left join tasker.steps s on s.step_uuid = u.step_uuid
  where h.kind <> 'lease';
end
$$;

-- Looks at the advisory lock of every worker that holds claims: it belongs to the worker's session,
-- so the server frees it within moments of the death of the process. Answers the workers whose lock
-- is free, whether anybody holds claims at all, and whether a lease has run out: a claim wakes
-- nobody, so a short lease may end long before the sweep meant to look again.
--
-- The claims of those among them that are suspected (their lock was free before, a second ago or
-- longer) end now, as if their lease had run out; what becomes of them is for the ordinary settle to
-- say, which looks at each lease again under its locks. While this looks at a lock its worker cannot
-- take it, but tries again; so it can neither come back in between unseen nor be taken for dead.
create function tasker.look_for_dead_workers(p_suspects text[], p_keys bigint[])
returns table (held boolean, overdue boolean, worker text, lock_key bigint, dead boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  v         record;
  v_free    boolean := false;
  v_overdue boolean;
begin
  v_overdue := exists (select from tasker.due d where d.kind = 'lease' and d.due_at <= clock_timestamp());
  for v in
    select w.worker, w.lock_key, exists (
        select from unnest(p_suspects, p_keys) s(worker, lock_key) where (s.worker, s.lock_key) = (w.worker, w.lock_key)
      ) as suspected
    from tasker.workers w
    -- What was said before the server started is about a session that ended with it.
    where w.lock_key is not null and w.seen_at > pg_postmaster_start_time()
      and exists (select from tasker.due d where d.kind = 'lease' and d.worker = w.worker)
    order by w.worker
  loop
    continue when not pg_try_advisory_xact_lock_shared(v.lock_key);
    v_free := true;
    if v.suspected then
      perform from tasker.steps s
      where s.step_uuid in (
          select u from tasker.due d cross join lateral unnest(d.step_uuids) u where d.kind = 'lease' and d.worker = v.worker)
        and s.state = 'in_progress' and s.claimed_by = v.worker
      order by s.step_uuid for no key update;
      update tasker.steps s set lease_expires_at = least(s.lease_expires_at, clock_timestamp())
      where s.step_uuid in (
          select u from tasker.due d cross join lateral unnest(d.step_uuids) u where d.kind = 'lease' and d.worker = v.worker)
        and s.state = 'in_progress' and s.claimed_by = v.worker;
      update tasker.due d set due_at = clock_timestamp()
      where d.due_id in (select l.due_id from tasker.due l where l.kind = 'lease' and l.worker = v.worker for update skip locked);
      -- Nothing more is sent on its account. If it lives after all, its next hello says so.
      perform tasker.worker_bye(v.worker);
    end if;
    return query select true, v_overdue or v.suspected, v.worker, v.lock_key, v.suspected;
  end loop;
  if not v_free then
    return query select exists (select from tasker.due d where d.kind = 'lease'), v_overdue, null::text, null::bigint, false;
  end if;
end
$$;

-- Removes messages of attempts that ended before anybody took them: too long in the queue,
-- cancelled, given up. Who reads the queue would drop them too, but a worker that is full, or only
-- says that it offers a handler, reads nothing, and they must not take the place of others for
-- ever. What is no step's message stays for the quarantine. Answers how many were removed.
create function tasker.drop_dead_messages(p_queue text, p_handlers text[], p_older interval, p_max int) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_dropped int;
begin
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

-- How much may still be sent to each queue that a live worker reads: about twice the slots
-- offered, less what lies in the queue for handlers that are offered. An estimate, without locks.
create function tasker.room() returns table (queue text, capacity bigint, room bigint, handlers text[], holding boolean)
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
    select q.queue, sum(w.slots) as slots,
      (select array_agg(distinct h) from tasker.workers o, unnest(o.handlers) h
       where q.queue = any(o.queues) and o.seen_at > clock_timestamp() - interval '30 s') as handlers
    from tasker.workers w cross join lateral unnest(w.queues) q(queue)
    where w.seen_at > clock_timestamp() - interval '30 s'
    group by q.queue
  loop
    if to_regclass(format('pgmq.%I', 'q_' || v.queue)) is null then
      continue;
    end if;
    v_count := format('select count(*) from (select from pgmq.%I where message->>''handler'' = any($1) limit $2) d', 'q_' || v.queue);
    execute v_count into v_depth using v.handlers, v.slots * 2;
    if v_depth >= v.slots * 2 and tasker.drop_dead_messages(v.queue, v.handlers, '1 s', 1000) > 0 then
      execute v_count into v_depth using v.handlers, v.slots * 2;
    end if;
    return query select v.queue, v.slots * 2, v.slots * 2 - v_depth, v.handlers,
      -- What no live worker offers waits by itself and holds up nobody else.
      exists (select from tasker.held_steps(v.queue, v.handlers, 1))
        or exists (select from tasker.steps s where s.queue = v.queue and s.held_by is not null and s.lane is not null);
  end loop;
end
$$;

-- Held steps whose turn it is: priority first, then the time they became ready.
-- Those that wait in a lane are found by `tasker.held_lanes`.
create function tasker.held_steps(p_queue text, p_handlers text[], p_max int)
returns table (task_uuid uuid, step_uuid uuid, priority int, ready_at timestamptz, handler text)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select s.task_uuid, s.step_uuid, s.priority, s.ready_at, d.handler
  from tasker.steps s
  join tasker.tasks t on t.task_uuid = s.task_uuid
  join tasker.template_steps d on d.template_id = t.template_id and d.step_index = s.step_index
  where s.queue = p_queue and s.held_by is not null and s.lane is null and d.handler = any(p_handlers) and t.state <> 'suspended'
  order by s.priority desc, s.ready_at limit p_max
$$;
revoke all on function tasker.take_due, tasker.look_for_dead_workers, tasker.drop_dead_messages, tasker.room, tasker.held_steps from public;
