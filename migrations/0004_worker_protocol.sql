-- What a worker in any language calls. Thin: compare, set, send; batched in, batched out,
-- and one bad item never fails the call. docs/worker-protocol.md is written against this.

-- Says who works here and what it offers: at start, on change, and every 10 s.
create function tasker.worker_hello(
  worker text, namespace text, queues text[], handlers text[], slots int,
  lock_key bigint default null, version text default null
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_changed boolean;
begin
  if not tasker.may_use(namespace) then
    raise exception 'namespace: this role may not use it; ask for a row in tasker.role_namespaces' using errcode = '42501';
  end if;
  select not exists (
    select from tasker.workers w
    where w.worker = worker_hello.worker and w.queues = worker_hello.queues and w.handlers = worker_hello.handlers
      and w.slots = worker_hello.slots and w.seen_at > clock_timestamp() - interval '30 s') into v_changed;
  insert into tasker.workers as w (worker, namespace, queues, handlers, slots, lock_key, version)
  values (worker, namespace, queues, handlers, slots, lock_key, version)
  on conflict on constraint workers_pkey do update set
    namespace = excluded.namespace, queues = excluded.queues, handlers = excluded.handlers,
    slots = excluded.slots, lock_key = excluded.lock_key, version = excluded.version, seen_at = clock_timestamp();
  if v_changed then
    insert into tasker.readers (queue, reader)
    select q, worker from unnest(queues) q on conflict do nothing;
    perform pg_notify('tasker', 'admit');
  end if;
end
$$;

-- The worker drains: nothing new is admitted for it.
create function tasker.worker_bye(worker text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from tasker.readers r where r.reader = worker_bye.worker;
  delete from tasker.workers w where w.worker = worker_bye.worker;
end
$$;

-- Takes up to `max` messages of the queue whose handlers the worker offers, and leases their
-- steps to it. The message is deleted here: from now on the row's lease is what sweep watches.
create function tasker.claim_steps(
  p_namespace text, p_queue text, p_worker text, p_handlers text[], p_max int, p_lease interval default '10 s'
) returns table (
  task uuid, step uuid, step_name text, generation int, attempt int, token uuid, handler text, input jsonb,
  correlation_id text, traceparent text, tracestate text, baggage text,
  claimed_at timestamptz, deadline timestamptz, lease_ms bigint, max_attempts int
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  v_queue    text := 'worker_' || p_namespace || coalesce('__' || p_queue, '');
  v_msg_ids  bigint[];
  v_steps    uuid[];
  v_attempts int[];
  v_parents  text[];
  v_baggage  text[];
  v_found    int;
  v_asleep   boolean;
  v_began    timestamptz;
  v_at       timestamptz;
begin
  if not tasker.may_use(p_namespace) then
    raise exception 'namespace: this role may not use it; ask for a row in tasker.role_namespaces' using errcode = '42501';
  end if;
  if p_max < 1 then
    return;
  end if;

  if to_regclass(format('pgmq.%I', 'q_' || v_queue)) is null then
    raise exception 'queue %: does not exist; it is made when a template that uses it is registered', v_queue using errcode = '42P01';
  end if;
  execute format('select * from tasker.%I($1, $2)', 'take_' || v_queue)
  into v_msg_ids, v_steps, v_attempts, v_parents, v_baggage
  using p_handlers, p_max;
  v_found := coalesce(cardinality(v_msg_ids), 0);

  -- Behind a lone message there is hardly another: who takes it is woken by the next.
  v_asleep := v_found < least(p_max, 2);
  update tasker.readers r set asleep = v_asleep, seen_at = clock_timestamp()
  where r.queue = v_queue and r.reader = p_worker and r.asleep <> v_asleep;
  if v_found = 0 then
    return;
  end if;

  perform from tasker.steps s
  where s.step_uuid = any(v_steps) and s.state = 'enqueued'
  order by s.step_uuid for no key update;
  v_began := clock_timestamp();
  v_at := clock_timestamp();

  return query
  with message as (
    select distinct on (m.step, m.attempt) m.* from unnest(v_steps, v_attempts, v_msg_ids, v_parents, v_baggage)
      as m(step, attempt, msg_id, traceparent, baggage)
    order by m.step, m.attempt
  ), claimed as (
    update tasker.steps s
    set state = 'in_progress', version = s.version + 1, claim_token = gen_random_uuid(), claimed_by = p_worker,
        lease_expires_at = v_at + coalesce(make_interval(secs => d.heartbeat_ms / 1000.0), p_lease),
        last_heartbeat_at = null, progress = null,
        last_at = greatest(v_at, s.last_at + interval '1 us')
    from message m, tasker.tasks t, tasker.template_steps d
    where s.step_uuid = m.step and s.state = 'enqueued' and s.attempt = m.attempt
      and t.task_uuid = s.task_uuid and t.namespace = p_namespace
      and t.state not in ('complete', 'error', 'cancelled', 'resolved_manually', 'suspended')
      and d.template_id = t.template_id and d.step_index = s.step_index
    returning s.task_uuid, s.step_uuid, s.version, s.generation, s.attempt, s.claim_token, s.input, s.last_at,
      s.lease_expires_at, d.name, d.handler, d.max_attempts, d.run_ms, d.heartbeat_ms,
      t.correlation_id, t.tracestate, m.traceparent, m.baggage, m.msg_id
  ), attempt as (
    insert into tasker.attempts (task_uuid, step_uuid, attempt, generation, claim_token, worker, worker_version, message_id, claim_began_at, claimed_at)
    select c.task_uuid, c.step_uuid, c.attempt, c.generation, c.claim_token, p_worker, w.version, c.msg_id, least(v_began, c.last_at), c.last_at
    from claimed c left join tasker.workers w on w.worker = p_worker
  ), logged as (
    insert into tasker.transitions (task_uuid, entity_uuid, version, generation, attempt, from_state, to_state, event,
      actor, claim_token, began_at, at)
    select c.task_uuid, c.step_uuid, c.version, c.generation, c.attempt, 'enqueued', 'in_progress', 'Claim',
      p_worker, c.claim_token, least(v_began, c.last_at), c.last_at
    from claimed c
  ), watched as (
    insert into tasker.due (due_at, kind, worker, step_uuids)
    select min(c.lease_expires_at), 'lease', p_worker, array_agg(c.step_uuid) from claimed c having count(*) > 0
  )
  select c.task_uuid, c.step_uuid, c.name, c.generation, c.attempt, c.claim_token, c.handler,
    -- (On an array or a text `?` asks something else.)
    case when c.input ? '$tasker.by_reference' and jsonb_typeof(c.input) = 'object'
      then tasker.resolve_input(c.task_uuid, c.input) else c.input end,
    c.correlation_id, c.traceparent, c.tracestate, c.baggage, c.last_at,
    c.last_at + make_interval(secs => c.run_ms / 1000.0), c.heartbeat_ms, c.max_attempts
  from claimed c;
end
$$;

-- Renews the lease of the claims a worker still holds: [{step, token, progress?}].
create function tasker.heartbeat(p_claims jsonb, p_lease interval default '10 s')
returns table (step text, still_yours boolean, cancel_requested boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  v_owner boolean := tasker.is_owner();
begin
  perform from tasker.steps s
  where s.step_uuid in (select (c->>'step')::uuid from jsonb_array_elements(p_claims) c where tasker.is_uuid(c->>'step'))
    and s.state = 'in_progress'
  order by s.step_uuid for no key update;
  return query
  with claim as (
    select o.ordinality, o.c->>'step' as step, o.c->'progress' as progress,
      case when tasker.is_uuid(o.c->>'step') then (o.c->>'step')::uuid end as step_uuid,
      case when tasker.is_uuid(o.c->>'token') then (o.c->>'token')::uuid end as token
    from jsonb_array_elements(p_claims) with ordinality as o(c, ordinality)
  ), renewed as (
    update tasker.steps s
    set lease_expires_at = clock_timestamp() + coalesce(make_interval(secs => d.heartbeat_ms / 1000.0), p_lease),
        last_heartbeat_at = clock_timestamp(),
        progress = case when octet_length(c.progress::text) <= 4096 then c.progress else s.progress end
    from claim c, tasker.tasks t, tasker.template_steps d
    where s.step_uuid = c.step_uuid and s.state = 'in_progress' and s.claim_token = c.token
      and t.task_uuid = s.task_uuid and (v_owner or tasker.may_use(t.namespace))
      and d.template_id = t.template_id and d.step_index = s.step_index
    returning s.step_uuid
  )
  select c.step, r.step_uuid is not null,
    r.step_uuid is null and exists (
      select from tasker.steps s join tasker.tasks t on t.task_uuid = s.task_uuid
      where s.step_uuid = c.step_uuid and s.claim_token = c.token and s.state = 'cancelled' and t.ended_by = 'cancel')
  from claim c left join renewed r on r.step_uuid = c.step_uuid
  order by c.ordinality;
end
$$;

-- Reports results: [{step, token, outcome: success|error, output | error {type, message, retryable,
-- retry_after_ms}, start_offset_ms, run_ms, usage, milestones}]. Only the current claim's report
-- counts; the same token again is accepted again and changes nothing.
create function tasker.report_results(p_results jsonb)
returns table (step text, accepted boolean, stale boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  v_limit     int := tasker.max_payload_bytes();
  v_began     timestamptz;
  v_at        timestamptz;
  v_owner     boolean := tasker.is_owner();
  v_ids       bigint[];
  v_messages  jsonb[];
  v_headers   jsonb[];
  v_accepted  uuid[];
  v_places    int[];
  v_stale     bigint;
begin
  if jsonb_typeof(p_results) is distinct from 'array' then
    raise exception 'results: must be a JSON array' using errcode = '22023';
  end if;

  with wanted as (
    select distinct on (o.r->>'step', o.r->>'token') o.ordinality::int as place,
      (o.r->>'step')::uuid as step_uuid, (o.r->>'token')::uuid as token,
      case when o.r->>'outcome' = 'success' then 'success' else 'error' end as outcome
    from jsonb_array_elements(p_results) with ordinality as o(r, ordinality)
    where tasker.is_uuid(o.r->>'step') and tasker.is_uuid(o.r->>'token')
    order by o.r->>'step', o.r->>'token', o.ordinality
  ), held as materialized (
    select w.place, w.outcome, s.step_uuid, s.task_uuid, s.generation, s.attempt, s.claim_token
    from wanted w
    join tasker.steps s on s.step_uuid = w.step_uuid and s.claim_token = w.token and s.state = 'in_progress'
    order by s.step_uuid for no key update of s
  )
  select array_agg(h.step_uuid), array_agg(h.place),
    array_agg(jsonb_build_object('v', 1, 'task', h.task_uuid, 'step', h.step_uuid, 'generation', h.generation,
      'attempt', h.attempt, 'token', h.claim_token, 'outcome', h.outcome)),
    array_agg(jsonb_build_object(
      'traceparent', '00-' || encode(t.trace_id, 'hex') || '-' || encode(t.root_span_id, 'hex') || case t.trace_flags & 1 when 1 then '-01' else '-00' end,
      'x-tasker-sender', encode(tasker.span_id(t.trace_id, h.step_uuid, 0, h.attempt, 10, 0), 'hex')))
  into v_accepted, v_places, v_messages, v_headers
  from held h
  join tasker.tasks t on t.task_uuid = h.task_uuid
  where v_owner or tasker.may_use(t.namespace);

  if v_accepted is not null then
    v_began := clock_timestamp();
    with sent as (
      insert into pgmq.q_step_results (vt, message, headers)
      select v_began, m.body, m.headers from unnest(v_messages, v_headers) with ordinality as m(body, headers, place)
      order by m.place returning msg_id
    )
    select array_agg(msg_id order by msg_id) into v_ids from sent;
    perform tasker.wake('step_results');
    v_at := clock_timestamp();

    with result as materialized (
      select sent.step_uuid, sent.message_id,
        case when r->>'outcome' = 'success' and problem is not null then 'error'
             when r->>'outcome' in ('success', 'error') then r->>'outcome' else 'error' end as outcome,
        case when r->>'outcome' = 'success' and problem is null
             then coalesce(r->'output', 'null') end as output,
        case when r->>'outcome' = 'success' and problem is not null
               then jsonb_build_object('type', 'invalid_output', 'retryable', false, 'message', 'the output ' || problem)
             when r->>'outcome' = 'error' and jsonb_typeof(r->'error') = 'object'
               then jsonb_build_object(
                 'type', left(coalesce(r->'error'->>'type', 'error'), 100),
                 'message', left(coalesce(r->'error'->>'message', ''), 1024),
                 'retryable', coalesce(r->'error'->'retryable' <> 'false'::jsonb, true),
                 'retry_after_ms', case when jsonb_typeof(r->'error'->'retry_after_ms') = 'number'
                   then to_jsonb(least(greatest((r->'error'->>'retry_after_ms')::numeric, 0), 1e11)) end)
             when r->>'outcome' is distinct from 'success'
               then '{"type": "invalid_report", "message": "outcome must be success or error, an error must be an object", "retryable": false}'
        end as error,
        case when jsonb_typeof(r->'start_offset_ms') = 'number' then least(greatest((r->>'start_offset_ms')::numeric, 0), 1e11)::float8 end as start_offset_ms,
        case when jsonb_typeof(r->'run_ms') = 'number' then least(greatest((r->>'run_ms')::numeric, 0), 1e11)::float8 end as run_ms,
        -- These only describe the attempt: what cannot be kept is left out. (A null on the left of
        -- `and` would not spare the right.)
        case when coalesce(jsonb_typeof(r->'usage'), 'null') <> 'null' and tasker.payload_problem(r->'usage', 65536) is null then r->'usage' end as usage,
        case when coalesce(jsonb_typeof(r->'milestones'), 'null') <> 'null' and tasker.payload_problem(r->'milestones', 65536) is null then r->'milestones' end as milestones
      from unnest(v_accepted, v_places, v_ids) as sent(step_uuid, place, message_id)
      -- (`offset 0` keeps these from being worked out anew wherever they are named.)
      cross join lateral (select p_results->(sent.place - 1) as r offset 0) reported
      -- What is short has no problem: 65 levels take 130 brackets.
      cross join lateral (select case when octet_length((r->'output')::text) > 130
        then tasker.payload_problem(r->'output', v_limit) end as problem offset 0) checked
    ), moved as (
      update tasker.steps s
      set state = case r.outcome when 'success' then 'enqueued_for_orchestration' else 'enqueued_as_error_for_orchestration' end,
          version = s.version + 1, last_at = greatest(v_at, s.last_at + interval '1 us')
      from result r
      where s.step_uuid = r.step_uuid and s.state = 'in_progress'
      returning s.task_uuid, s.step_uuid, s.version, s.generation, s.attempt, s.claim_token, s.claimed_by, s.state, s.last_at,
        r.outcome, r.output, r.error, r.start_offset_ms, r.run_ms, r.usage, r.milestones, r.message_id
    ), noted as (
      update tasker.attempts a
      set report_began_at = least(v_began, m.last_at), reported_at = m.last_at, outcome = m.outcome, output = m.output, error = m.error,
          start_offset_ms = m.start_offset_ms, run_ms = m.run_ms, usage = m.usage, milestones = m.milestones, result_message_id = m.message_id
      from moved m
      where a.task_uuid = m.task_uuid and a.step_uuid = m.step_uuid and a.attempt = m.attempt
    )
    insert into tasker.transitions (task_uuid, entity_uuid, version, generation, attempt, from_state, to_state, event,
      actor, claim_token, began_at, at)
    select m.task_uuid, m.step_uuid, m.version, m.generation, m.attempt, 'in_progress', m.state, 'Report',
      m.claimed_by, m.claim_token, least(v_began, m.last_at), m.last_at
    from moved m;
  end if;

  if cardinality(v_accepted) = jsonb_array_length(p_results) then
    return query
      select r->>'step', true, false from jsonb_array_elements(p_results) r;
    return;
  end if;

  if jsonb_array_length(p_results) > 0 then
    select count(*) into v_stale from jsonb_array_elements(p_results) r
    where not coalesce(r->>'step' = any(v_accepted::text[]), false);
    insert into tasker.counters (name, n) values ('unmatched_reports', v_stale);
  end if;

  return query
  select o.r->>'step', known.yes, not known.yes
  from jsonb_array_elements(p_results) with ordinality as o(r, ordinality)
  cross join lateral (select case
    when not coalesce(tasker.is_uuid(o.r->>'step') and tasker.is_uuid(o.r->>'token'), false) then false
    else exists (select from tasker.steps s
                 join tasker.attempts a on a.task_uuid = s.task_uuid and a.step_uuid = s.step_uuid
                 where s.step_uuid = (o.r->>'step')::uuid and a.claim_token = (o.r->>'token')::uuid
                   and a.reported_at is not null)
    end as yes) known
  order by o.ordinality;
end
$$;

-- The output of an earlier step of the same task, for handlers that ask by name.
create function tasker.step_output(p_task uuid, p_step_name text) returns jsonb
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  select a.output
  from tasker.tasks t
  join tasker.template_steps d on d.template_id = t.template_id and d.name = p_step_name
  join tasker.steps s on s.task_uuid = t.task_uuid and s.step_index = d.step_index and s.item = -1
  join tasker.attempts a on a.task_uuid = t.task_uuid and a.step_uuid = s.step_uuid and a.attempt = s.attempt
  where t.task_uuid = p_task and s.state in ('complete', 'resolved_manually') and tasker.may_use(t.namespace)
$$;

-- Puts back what a stored input leaves out: large values are kept once, as the task's input or on
-- the attempt that reported them, and named where they are read.
create function tasker.resolve_input(p_task uuid, p_stored jsonb) returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_input jsonb := p_stored->'input';
  v_left  jsonb;
  v_value jsonb;
  v_at    text[];
begin
  for v_left in select jsonb_array_elements(p_stored->'$tasker.by_reference') loop
    v_at := array(select jsonb_array_elements_text(v_left->'at'));
    v_value := case when v_left->>'step' is null then (select t.input from tasker.tasks t where t.task_uuid = p_task)
      else tasker.step_output(p_task, v_left->>'step') end
      #> array(select jsonb_array_elements_text(v_left->'path'));
    v_input := case when cardinality(v_at) = 0 then coalesce(v_value, 'null') else jsonb_set(v_input, v_at, coalesce(v_value, 'null')) end;
  end loop;
  return v_input;
end
$$;

-- The steps of unfinished tasks that somebody must move; planned by itself, with the indexes of both tables.
create function tasker.open_steps()
returns table (task_uuid uuid, step_uuid uuid, attempt int, state text, due_at timestamptz, is_held boolean)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_nestloop = on
as $$
  select s.task_uuid, s.step_uuid, s.attempt, s.state, s.due_at, s.held_by is not null
  from tasker.tasks t join tasker.steps s on s.task_uuid = t.task_uuid
  where t.finished_at is null
    and (s.held_by is not null or s.state not in ('pending', 'complete', 'error', 'cancelled', 'skipped', 'resolved_manually'))
$$;

-- Promise 4: every non-terminal task holds a progress token: a message, a live claim, a due
-- time or a declared wait. This looks at everything that is unfinished and belongs in a check, not
-- in a loop. What it compares are lists whose lengths nobody knows beforehand: as nested loops
-- 100,000 timers would be compared with 100,000 steps, and sessions of the hot path know no others.
create function tasker.stuck_tasks() returns table (task_uuid uuid, state text, since timestamptz, why text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_nestloop = off
set enable_hashjoin = on
set enable_mergejoin = on
set enable_seqscan = on
as $$
#variable_conflict use_column
declare
  v_queue text;
  v_queued uuid[] := '{}';
  v_some uuid[];
begin
  for v_queue in select queue_name from pgmq.meta where queue_name like 'worker\_%' loop
    execute format($q$ select array_agg((message->>'step')::uuid) from pgmq.%I where tasker.is_uuid(message->>'step') $q$, 'q_' || v_queue)
    into v_some;
    v_queued := v_queued || coalesce(v_some, '{}');
  end loop;
  return query
  with requested as (
    select (message->>'task')::uuid as task_uuid from pgmq.q_task_requests where tasker.is_uuid(message->>'task')
  ), reported as (
    select (message->>'step')::uuid as step_uuid from pgmq.q_step_results where tasker.is_uuid(message->>'step')
  ), queued as (
    select unnest(v_queued) as step_uuid
  ), watched as (
    select distinct u.step_uuid from tasker.due d cross join lateral unnest(d.step_uuids) u(step_uuid)
    -- That a step may take only so long moves it to its end, but nothing before.
    where d.step_uuids is not null and d.kind <> 'step_timeout'
  ), open as materialized (
    select o.task_uuid, o.step_uuid, o.attempt, o.state, o.due_at, o.is_held from tasker.open_steps() o
  ), alive as (
    select o.task_uuid from open o where o.is_held
    union all
    select o.task_uuid from open o join queued q on q.step_uuid = o.step_uuid where o.state = 'enqueued'
    union all
    select o.task_uuid from open o join reported r on r.step_uuid = o.step_uuid
    where o.state in ('enqueued_for_orchestration', 'enqueued_as_error_for_orchestration')
    union all
    select o.task_uuid from open o join watched w on w.step_uuid = o.step_uuid where o.state in ('in_progress', 'waiting_for_retry')
    union all
    select o.task_uuid from open o left join watched w on w.step_uuid = o.step_uuid
    where o.state = 'waiting' and (o.due_at is null or w.step_uuid is not null)
      -- A task that it started moves it when it ends, by a message in the same transaction.
      and not exists (select from tasker.children c
        where c.task_uuid = o.task_uuid and c.step_uuid = o.step_uuid and c.attempt = o.attempt
          and not (c.awaited and exists (select from tasker.tasks k where k.task_uuid = c.child_uuid and k.finished_at is null)))
  )
  select t.task_uuid, t.state, t.last_at, 'no message, claim, due time or declared wait'
  from tasker.tasks t
  where t.finished_at is null and t.state not in ('suspended', 'blocked_by_failures')
    and not exists (select from alive a where a.task_uuid = t.task_uuid)
    and not exists (select from requested q where q.task_uuid = t.task_uuid)
    and not exists (select from tasker.due d where d.task_uuid = t.task_uuid and d.kind = 'start');
end
$$;

revoke all on all functions in schema tasker from public;
