-- Whoever calls a public function may be a stranger: a role with the grants of a worker, a producer
-- or an operator of one namespace. What it says is checked here, at the door, so that nothing which
-- reads the rows has to wonder; the constraints on the rows say the same once more.

-- What is wrong with a name that others will read, or null.
create function tasker.name_problem(p_argument text, p_name text, p_longest int default 200) returns text
language sql immutable parallel safe
as $$
  select case when p_name is null then p_argument || ': is missing'
    when octet_length(p_name) not between 1 and p_longest or p_name ~ '[[:cntrl:]]'
      then format('%s: must have 1 to %s bytes and no control characters', p_argument, p_longest) end
$$;

-- The same of a namespace.
create function tasker.namespace_problem(p_namespace text) returns text
language sql immutable parallel safe
as $$
  select case when p_namespace is null then 'namespace: is missing'
    when octet_length(p_namespace) > 40 or p_namespace !~ '^[a-z](_?[a-z0-9])*$'
      then 'namespace: may hold only a-z, 0-9 and single _ between them, starts with a letter, and has 40 bytes at most' end
$$;

-- What is wrong with the queues that a worker of this namespace says it reads, or null. A queue that
-- does not exist yet is fine: it is made when a template that uses it is registered.
create function tasker.queues_problem(p_namespace text, p_queues text[]) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_own   text := 'worker_' || p_namespace;
  v_queue text;
begin
  if p_queues is null or cardinality(p_queues) not between 1 and 100 then
    return 'queues: name from 1 to 100 queues';
  end if;
  foreach v_queue in array p_queues loop
    if v_queue is null then
      return 'queues: must hold no null';
    elsif v_queue <> v_own and not (octet_length(v_queue) <= 100 and starts_with(v_queue, v_own || '__')
        and substring(v_queue from length(v_own) + 3) ~ '^[a-z](_?[a-z0-9])*$') then
      return format('queues: %s is no queue of steps of namespace %s; those are %s and %s__NAME',
        regexp_replace(left(v_queue, 60), '[[:cntrl:]]', ' ', 'g'), p_namespace, v_own, v_own);
    end if;
  end loop;
  return null;
end
$$;

-- The same of the handlers that it offers.
create function tasker.handlers_problem(p_handlers text[]) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_handler text;
begin
  if p_handlers is null or cardinality(p_handlers) not between 1 and 10000 then
    return 'handlers: name from 1 to 10000 handlers; a worker that offers nothing says bye';
  end if;
  foreach v_handler in array p_handlers loop
    if v_handler is null then
      return 'handlers: must hold no null';
    elsif tasker.name_problem('', v_handler) is not null then
      return 'handlers: each must have 1 to 200 bytes and no control characters';
    end if;
  end loop;
  return null;
end
$$;

-- Who is written down for an act. The owner of the schema (the API server, an operator's shell) says
-- for whom it acts; of any other role its own name stands beside what it says.
create function tasker.actor_name(p_actor text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_given text := nullif(btrim(regexp_replace(left(p_actor, 1000), '[[:cntrl:]]', ' ', 'g')), '');
  v_role  text := format(' (role %s)', session_user);
begin
  if v_given is null or v_given = session_user then
    return session_user;
  end if;
  if tasker.is_owner() then
    return left(v_given, 100);
  end if;
  return left(v_given, 100 - length(v_role)) || v_role;
end
$$;

-- A worker's row belongs to the role that made it; null: it was made before roles were noted.
alter table tasker.workers add column role_name name;
alter table tasker.workers alter column role_name set default session_user;

-- Rows that could not be made any more. Whoever made one hears why at its next hello.
delete from tasker.workers w
where coalesce(tasker.name_problem('worker', w.worker), tasker.namespace_problem(w.namespace),
    tasker.queues_problem(w.namespace, w.queues), tasker.handlers_problem(w.handlers)) is not null
  or w.slots not between 0 and 100000 or octet_length(w.version) > 200 or w.version ~ '[[:cntrl:]]';
alter table tasker.workers
  add constraint workers_names_are_short check (
    tasker.name_problem('worker', worker) is null and octet_length(version) <= 200 and version !~ '[[:cntrl:]]'),
  add constraint workers_namespace_is_one check (tasker.namespace_problem(namespace) is null),
  add constraint workers_queues_are_of_their_namespace check (tasker.queues_problem(namespace, queues) is null),
  add constraint workers_handlers_are_names check (tasker.handlers_problem(handlers) is null),
  add constraint workers_slots_are_few check (slots between 0 and 100000);

-- Whether the caller may speak for a worker of this role in this namespace. Whoever was not seen for
-- 30 s counts as gone: its name is free for those who work in the same namespace, under whatever
-- role, since a password service may give each process a role of its own.
create function tasker.may_speak_for(p_role name, p_namespace text, p_seen_at timestamptz) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return p_role = session_user or tasker.is_owner()
    or ((p_role is null or p_seen_at < clock_timestamp() - interval '30 s') and tasker.may_use(p_namespace));
end
$$;

-- Says who works here and what it offers: at start, on change, and every 10 s.
create or replace function tasker.worker_hello(
  worker text, namespace text, queues text[], handlers text[], slots int,
  lock_key bigint default null, version text default null
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_problem text;
  v_changed boolean;
  v_is_new  boolean;
begin
  if namespace is not null and not tasker.may_use(namespace) then
    raise exception 'namespace: this role may not use it; ask for a row in tasker.role_namespaces' using errcode = '42501';
  end if;
  v_problem := coalesce(tasker.name_problem('worker', worker), tasker.namespace_problem(namespace),
    tasker.queues_problem(namespace, queues), tasker.handlers_problem(handlers),
    case when slots is null or slots not between 0 and 100000 then 'slots: must be from 0 to 100000'
      when octet_length(version) > 200 or version ~ '[[:cntrl:]]' then 'version: must have 200 bytes at most and no control characters' end);
  if v_problem is not null then
    raise exception '%', v_problem using errcode = '22023';
  end if;
  select not exists (
    select from tasker.workers w
    where w.worker = worker_hello.worker and w.queues = worker_hello.queues and w.handlers = worker_hello.handlers
      and w.slots = worker_hello.slots and w.seen_at > clock_timestamp() - interval '30 s') into v_changed;
  insert into tasker.workers as w (worker, namespace, queues, handlers, slots, lock_key, version)
  values (worker, namespace, queues, handlers, slots, lock_key, version)
  on conflict on constraint workers_pkey do update set
    namespace = excluded.namespace, queues = excluded.queues, handlers = excluded.handlers,
    slots = excluded.slots, lock_key = excluded.lock_key, version = excluded.version, seen_at = clock_timestamp(),
    -- The owner speaks for others and takes nothing from them.
    role_name = case when tasker.is_owner() then coalesce(w.role_name, session_user) else session_user end
  where tasker.may_speak_for(w.role_name, w.namespace, w.seen_at)
  returning w.xmax = 0 into v_is_new;
  if v_is_new is null then
    raise exception 'worker: % is a worker of another role; choose another name', left(worker, 60) using errcode = '42501';
  end if;
  -- Who admits steps reads them all, for everybody.
  if v_is_new and (select count(*) from tasker.workers w where w.namespace = worker_hello.namespace) > 10000 then
    raise exception 'worker: namespace % has 10000 workers already; those that are gone are forgotten after an hour', namespace using errcode = '22023';
  end if;
  if v_changed then
    insert into tasker.readers (queue, reader)
    select q, worker from unnest(queues) q on conflict do nothing;
    perform pg_notify('tasker', 'admit');
  end if;
end
$$;

-- The worker drains: nothing new is admitted for it.
create or replace function tasker.worker_bye(worker text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if worker is null then
    raise exception 'worker: is missing' using errcode = '22023';
  end if;
  delete from tasker.workers w where w.worker = worker_bye.worker and tasker.may_speak_for(w.role_name, w.namespace, w.seen_at);
  if not found and exists (select from tasker.workers w where w.worker = worker_bye.worker) then
    raise exception 'worker: % is a worker of another role; only that role may say bye for it', left(worker, 60) using errcode = '42501';
  end if;
  -- Readers of the common queues are orchestrators and clients, whatever they are called.
  delete from tasker.readers r where r.reader = worker_bye.worker and tasker.may_use(tasker.queue_namespace(r.queue));
end
$$;

-- Takes up to `max` messages of the queue whose handlers the worker offers, and leases their
-- steps to it. The message is deleted here: from now on the row's lease is what sweep watches.
-- The lease is the template's (10 s where it names none); `p_lease` has never changed it, and stays
-- only for those who pass it.
create or replace function tasker.claim_steps(
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
  v_version  text;
  v_role     name;
begin
  if not tasker.may_use(p_namespace) then
    raise exception 'p_namespace: this role may not use it; ask for a row in tasker.role_namespaces' using errcode = '42501';
  end if;
  -- One expression, which costs a claim next to nothing. A null among the handlers would take everything.
  if p_namespace is null or p_worker is null or p_max is null or p_handlers is null or p_max > 10000
    or octet_length(p_worker) not between 1 and 200 or p_worker ~ '[[:cntrl:]]' or octet_length(p_queue) > 100
    or array_ndims(p_handlers) > 1 or cardinality(p_handlers) > 10000 or array_position(p_handlers, null) is not null
  then
    raise exception '%', coalesce(tasker.name_problem('p_namespace', p_namespace), tasker.name_problem('p_worker', p_worker),
      case when p_max is null or p_max > 10000 then 'p_max: must be 10000 at most' end,
      case when octet_length(p_queue) > 100 then 'p_queue: must have 100 bytes at most' end,
      'p_handlers: must be a list of at most 10000 names, without nulls') using errcode = '22023';
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
  where r.queue = v_queue and r.reader = p_worker and r.asleep <> v_asleep
    -- Looked at last, and only when the mark changes.
    and coalesce((select tasker.may_speak_for(w.role_name, w.namespace, w.seen_at) from tasker.workers w where w.worker = r.reader), false);
  if v_found = 0 then
    return;
  end if;

  select w.version, w.role_name into v_version, v_role from tasker.workers w where w.worker = p_worker;
  if v_role <> session_user and not tasker.is_owner() then
    raise exception 'p_worker: % is a worker of another role; choose another name', left(p_worker, 60) using errcode = '42501';
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
        lease_expires_at = v_at + make_interval(secs => d.heartbeat_ms / 1000.0),
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
    select c.task_uuid, c.step_uuid, c.attempt, c.generation, c.claim_token, p_worker, v_version, c.msg_id, least(v_began, c.last_at), c.last_at
    from claimed c
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

-- The progress of a claim as it may be kept, or null and a notice to the caller: what is too long, too
-- deep or no number for others would fail whoever reads it.
create function tasker.kept_progress(p_step text, p_progress jsonb) returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_problem text := tasker.payload_problem(p_progress, 4096);
begin
  if v_problem is null then
    return p_progress;
  end if;
  raise notice 'the progress of step % is not kept: it %', left(p_step, 36), v_problem;
  return null;
end
$$;

-- Renews the lease of the claims a worker still holds: [{step, token, progress?}].
create or replace function tasker.heartbeat(p_claims jsonb, p_lease interval default '10 s')
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
  if jsonb_typeof(p_claims) is distinct from 'array' then
    raise exception 'p_claims: must be a JSON array of {step, token, progress}' using errcode = '22023';
  end if;
  -- Only of the claims whose token is known: else anybody could lock any step.
  perform from tasker.steps s
  where (s.step_uuid, s.claim_token) in (
      select (c->>'step')::uuid, (c->>'token')::uuid from jsonb_array_elements(p_claims) c
      where tasker.is_uuid(c->>'step') and tasker.is_uuid(c->>'token'))
    and s.state = 'in_progress'
  order by s.step_uuid for no key update;
  return query
  with claim as (
    select o.ordinality, o.c->>'step' as step, case when octet_length((o.c->'progress')::text) > 130
        then tasker.kept_progress(o.c->>'step', o.c->'progress') else o.c->'progress' end as progress,
      case when tasker.is_uuid(o.c->>'step') then (o.c->>'step')::uuid end as step_uuid,
      case when tasker.is_uuid(o.c->>'token') then (o.c->>'token')::uuid end as token
    from jsonb_array_elements(p_claims) with ordinality as o(c, ordinality)
  ), renewed as (
    update tasker.steps s
    set lease_expires_at = clock_timestamp() + make_interval(secs => d.heartbeat_ms / 1000.0),
        last_heartbeat_at = clock_timestamp(),
        progress = coalesce(c.progress, s.progress)
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
create or replace function tasker.report_results(p_results jsonb)
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
    raise exception 'p_results: must be a JSON array of {step, token, outcome, …}' using errcode = '22023';
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
                   then to_jsonb(trim_scale(round(least(greatest((r->'error'->>'retry_after_ms')::numeric, 0), 1e11), 3))) end)
             when r->>'outcome' is distinct from 'success'
               then '{"type": "invalid_report", "message": "outcome must be success or error, an error must be an object", "retryable": false}'
        end as error,
        -- (Rounded: 1e-400 is no double, and would fail the call.)
        case when jsonb_typeof(r->'start_offset_ms') = 'number' then round(least(greatest((r->>'start_offset_ms')::numeric, 0), 1e11), 6)::float8 end as start_offset_ms,
        case when jsonb_typeof(r->'run_ms') = 'number' then round(least(greatest((r->>'run_ms')::numeric, 0), 1e11), 6)::float8 end as run_ms,
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

-- Sends the wish. `p_more` has what the message carries beyond the task, the actor and the reason.
create or replace function tasker.ask(p_task uuid, p_action text, p_reason text, p_actor text, p_more jsonb default '{}') returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_state     text;
  v_namespace text;
  v_template  int;
  v_steps     text[] := coalesce(array(select jsonb_array_elements_text(p_more->'steps')), '{}') || coalesce(array[p_more->>'step'], '{}');
  v_problem   text;
  v_actor     text := tasker.actor_name(p_actor);
begin
  if jsonb_array_length(coalesce(p_more->'steps', '[]')) > 1000 then
    return 'steps: name 1000 steps at most';
  elsif p_more->'steps' @> '[null]' or '' = any(v_steps) then
    return 'steps: each must be the name of a step';
  end if;
  v_steps := array_remove(v_steps, null);
  select t.state, t.namespace, t.template_id into v_state, v_namespace, v_template from tasker.tasks t where t.task_uuid = p_task;
  if v_state is null or not tasker.may_use(v_namespace) then
    return 'no such task';
  end if;
  -- A suspension that nobody holds (each reading is counted until it is put back) is simply taken back.
  if p_action = 'resume' and v_state not in ('suspended', 'complete', 'error', 'cancelled', 'resolved_manually') then
    delete from pgmq.q_task_requests q where q.msg_id in (
      select r.msg_id from pgmq.q_task_requests r
      where r.message->>'type' = 'suspend' and r.message->>'task' = p_task::text and r.read_ct = 0
      for update skip locked);
    if found then
      insert into tasker.audit (task_uuid, action, actor, reason, details)
      values (p_task, 'resume', v_actor, left(p_reason, 1000), '{"suspension": "taken back before it began"}');
      return 'accepted';
    end if;
    if exists (select from pgmq.q_task_requests r where r.message->>'type' = 'suspend' and r.message->>'task' = p_task::text) then
      return 'the task is just being suspended; ask again in a moment';
    end if;
  end if;
  v_problem := tasker.act_problem(p_action, v_state, v_steps);
  if v_problem is not null then
    return v_problem;
  end if;
  select format('step: the template has no step %s', left(n, 40)) into v_problem
  from unnest(v_steps) n
  where not exists (select from tasker.template_steps d where d.template_id = v_template and d.name = n) limit 1;
  if v_problem is not null then
    return v_problem;
  end if;
  if cardinality(v_steps) > 0 then
    select case
      when s.state is null then 'the task has not begun; it has no steps yet'
      when p_action like '%\_step' and s.state in ('complete', 'cancelled', 'skipped', 'resolved_manually')
        then format('step %s is %s already', d.name, s.state)
      when p_action = 'retry' and s.state <> 'error' then format('step %s is %s; only a failed step can be retried', d.name, s.state)
    end into v_problem
    from unnest(v_steps) n
    join tasker.template_steps d on d.template_id = v_template and d.name = n
    left join tasker.steps s on s.task_uuid = p_task and s.step_index = d.step_index and s.item = -1
    order by 1 nulls last limit 1;
    if v_problem is not null then
      return v_problem;
    end if;
  end if;
  perform pgmq.send('task_requests', jsonb_build_object('v', 1, 'type', p_action,
    'task', p_task, 'actor', v_actor, 'reason', left(p_reason, 1000)) || p_more);
  perform tasker.wake('task_requests');
  return 'accepted';
end
$$;

-- The step is not needed; what stands behind it goes on.
create or replace function tasker.skip_step(task uuid, step text, reason text default null, actor text default session_user) returns text
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
  select case when coalesce(step, '') = '' then 'step: name the step to be skipped'
    else tasker.ask(task, 'skip_step', reason, actor, jsonb_build_object('step', step)) end
$$;

-- An output given by hand has the limits of any other.
create or replace function tasker.settle_step(p_task uuid, p_step text, p_action text, p_output jsonb, p_reason text, p_actor text) returns text
language sql
set search_path = pg_catalog, pg_temp
as $$
  select case when coalesce(p_step, '') = '' then 'step: name the step to be settled'
    else coalesce('output: ' || tasker.payload_problem(p_output, tasker.max_payload_bytes()),
      tasker.ask(p_task, p_action, p_reason, p_actor, jsonb_build_object('step', p_step)
        || case when p_output is not null then jsonb_build_object('output', p_output) else '{}' end)) end
$$;

-- Does one act to every task that matches, up to `p_max` of them in the order of their uuids, and
-- says how many there were, a few of them, and where the next page begins (null: that was all).
-- The filter may name namespace, template, status (the public word), correlation_id, and `after`.
create or replace function tasker.act_on_tasks(
  p_filter jsonb, p_action text, p_reason text default null, p_actor text default session_user,
  p_dry_run boolean default true, p_max int default 1000
) returns jsonb
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_states  text[];
  v_unknown text;
  v_tasks   uuid[];
  v_asked   bigint;
begin
  if p_action is null or p_action not in ('cancel', 'terminate', 'suspend', 'resume', 'retry', 'give_up', 'resolve') then
    raise exception 'action: must be cancel, terminate, suspend, resume, retry, give_up or resolve' using errcode = '22023';
  end if;
  if jsonb_typeof(p_filter) is distinct from 'object' then
    raise exception 'filter: must be a JSON object; name a namespace, template, status or correlation_id' using errcode = '22023';
  end if;
  if p_dry_run is null then
    raise exception 'p_dry_run: must be true or false' using errcode = '22023';
  end if;
  if p_max is null or p_max not between 1 and 10000 then
    raise exception 'p_max: must be from 1 to 10000' using errcode = '22023';
  end if;
  select k into v_unknown from jsonb_object_keys(p_filter) k
  where k not in ('namespace', 'template', 'status', 'correlation_id', 'after') limit 1;
  if v_unknown is not null then
    raise exception 'filter: % is not known; use namespace, template, status, correlation_id and after', left(v_unknown, 40) using errcode = '22023';
  end if;
  -- A null would match everything.
  select e.key into v_unknown from jsonb_each(p_filter) e
  where jsonb_typeof(e.value) <> 'string' or e.value = '""' limit 1;
  if v_unknown is not null then
    raise exception 'filter: % must be a text, and not an empty one; leave away what is not meant', v_unknown using errcode = '22023';
  end if;
  if p_filter ? 'after' and not tasker.is_uuid(p_filter->>'after') then
    raise exception 'filter: after must be the uuid of a task' using errcode = '22023';
  end if;
  if not p_filter ?| array['namespace', 'template', 'status', 'correlation_id'] then
    raise exception 'filter: must say which tasks; name a namespace, template, status or correlation_id' using errcode = '22023';
  end if;
  v_states := case p_filter->>'status'
    when 'queued' then array['pending'] when 'running' then array['steps_in_process']
    when 'waiting' then array['waiting_for_dependencies', 'waiting_for_retry', 'blocked_by_failures']
    when 'suspended' then array['suspended'] when 'completed' then array['complete', 'resolved_manually']
    when 'failed' then array['error'] when 'cancelled' then array['cancelled'] end;
  if p_filter->>'status' is not null and v_states is null then
    raise exception 'status: must be queued, running, waiting, suspended, completed, failed or cancelled' using errcode = '22023';
  end if;
  v_tasks := array(
    select t.task_uuid from tasker.tasks t join tasker.templates p on p.template_id = t.template_id
    where (p_filter->>'namespace' is null or t.namespace = p_filter->>'namespace')
      and (p_filter->>'template' is null or p.name = p_filter->>'template')
      and (v_states is null or t.state = any(v_states))
      and (p_filter->>'correlation_id' is null or t.correlation_id = p_filter->>'correlation_id')
      and (p_filter->>'after' is null or t.task_uuid > (p_filter->>'after')::uuid)
      and tasker.act_problem(p_action, t.state, '{}') is null
      and tasker.may_use(t.namespace)
    order by t.task_uuid limit p_max);
  if not p_dry_run then
    select count(*) into v_asked from unnest(v_tasks) u(task) where tasker.ask(u.task, p_action, p_reason, p_actor) = 'accepted';
  end if;
  return jsonb_build_object('matched', cardinality(v_tasks), 'asked', coalesce(v_asked, 0), 'dry_run', p_dry_run,
    'sample', to_jsonb(v_tasks[1:20]),
    'next', case when cardinality(v_tasks) = p_max then v_tasks[cardinality(v_tasks)] end);
end
$$;

-- Keeps the signal and sends the hint; an orchestrator gives it to the first step, in file
-- order, that waits for it. Returns 'accepted', or why not.
create or replace function tasker.signal_task(
  task uuid, name text, payload jsonb default '{}', actor text default session_user, traceparent text default null
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_state     text;
  v_namespace text;
  v_template  int;
  v_waits     jsonb;
  v_problem   text;
begin
  select t.state, t.namespace, t.template_id into v_state, v_namespace, v_template
  from tasker.tasks t where t.task_uuid = task;
  if v_state is null or not tasker.may_use(v_namespace) then
    return 'no such task';
  end if;
  if v_state in ('complete', 'error', 'cancelled', 'resolved_manually') then
    return format('the task has already ended (%s)', tasker.status_word(v_state));
  end if;
  payload := coalesce(payload, '{}');
  v_problem := tasker.payload_problem(payload, tasker.max_payload_bytes());
  if v_problem is not null then
    return 'payload: ' || v_problem;
  end if;
  select jsonb_path_query_array(d.definition, '$.steps[*].wait.signal') into v_waits
  from tasker.templates d where d.template_id = v_template;
  if not exists (select from jsonb_array_elements(v_waits) w where w->>'name' = name) then
    return coalesce(
      (select format('name: no step of this task waits for a signal of this name; it waits for: %s',
         left(string_agg(distinct w->>'name', ', '), 1000)) from jsonb_array_elements(v_waits) w having count(*) > 0),
      'name: no step of this task waits for a signal');
  end if;
  if not exists (select from jsonb_array_elements(v_waits) w
                 where w->>'name' = name and (w->'allowed' is null or w->'allowed' @> jsonb_build_array(payload->'answer'))) then
    return (select format('payload: answer must be one of: %s', left(string_agg(distinct a, ', '), 1000))
            from jsonb_array_elements(v_waits) w, jsonb_array_elements_text(w->'allowed') a where w->>'name' = name);
  end if;
  if (select count(*) from (select from tasker.signals k where k.task_uuid = task limit 1000) kept) >= 1000 then
    return 'the task already keeps 1000 signals that no step has used; send no more until it has';
  end if;
  insert into tasker.signals (task_uuid, name, payload, actor, traceparent)
  values (task, name, payload, tasker.actor_name(actor),
    case when tasker.is_traceparent(traceparent) then traceparent end);
  perform pgmq.send('task_requests', jsonb_build_object('v', 1, 'type', 'signal', 'task', task));
  perform tasker.wake('task_requests');
  return 'accepted';
end
$$;

-- Nothing more is sent to a paused queue, and nothing in it is claimed; what runs runs on.
-- Returns 'accepted', or why not. Again is no error: the new reason takes the old one's place.
create or replace function tasker.pause_queue(
  queue text, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if tasker.queue_namespace(queue) is null or not exists (select from pgmq.meta m where m.queue_name = queue)
    or not tasker.may_use(tasker.queue_namespace(queue)) then
    return 'no such queue of steps; `tasker queue list` shows those that are';
  end if;
  insert into tasker.paused_queues as p (queue, actor, reason) values (queue, tasker.actor_name(actor), left(reason, 1000))
  on conflict on constraint paused_queues_pkey do update set actor = excluded.actor, reason = excluded.reason;
  insert into tasker.audit (subject, action, actor, reason)
  values ('queue ' || queue, 'pause', tasker.actor_name(actor), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  return 'accepted';
end
$$;

-- Lets a paused queue go on: what lies in it is claimed again, what was held is sent.
create or replace function tasker.resume_queue(
  queue text, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if not coalesce(tasker.may_use(tasker.queue_namespace(queue)), false) then
    return 'no such queue of steps; `tasker queue list` shows those that are';
  end if;
  delete from tasker.paused_queues p where p.queue = resume_queue.queue;
  if not found then
    return 'the queue is not paused';
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('queue ' || queue, 'resume', tasker.actor_name(actor), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  perform tasker.wake(queue);
  return 'accepted';
end
$$;

create or replace function tasker.remove_limit(
  namespace text, handler text default null, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_name text := namespace || coalesce(':' || handler, '');
  v_id   bigint;
begin
  if tasker.may_use(namespace) then
    delete from tasker.limits l where l.name = v_name and l.kind <> 'template' returning l.limit_id into v_id;
  end if;
  if v_id is null then
    return 'there is no such limit; `tasker limit list` shows those that are';
  end if;
  delete from tasker.places p where p.limit_id = v_id;
  insert into tasker.audit (subject, action, actor, reason) values ('limit ' || v_name, 'remove_limit', tasker.actor_name(actor), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  return 'accepted';
end
$$;

-- Sets the limit of a namespace, or of one handler in it. It takes effect for what is not yet
-- sent; what was sent before runs on, uncounted. Returns 'accepted', or why not.
create or replace function tasker.set_limit(
  namespace text, handler text default null, concurrency int default null, rate int default null,
  per interval default null, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_name text := namespace || coalesce(':' || handler, '');
  -- (Of an infinite interval there is no such number.)
  v_per  bigint := case when per is not null then extract(epoch from least(greatest(per, interval '0'), interval '10 years')) * 1000 end;
begin
  if namespace is null then
    return 'namespace: is missing';
  elsif not tasker.may_use(namespace) then
    return 'namespace: this role may not use it; ask for a row in tasker.role_namespaces';
  elsif tasker.namespace_problem(namespace) is not null then
    return tasker.namespace_problem(namespace);
  elsif octet_length(handler) > 100 then
    return 'handler: must have 100 bytes at most';
  elsif handler !~ '^[a-z][a-z0-9_]*(\.[a-z0-9_]+)*$' then
    return 'handler: may hold only a-z, 0-9 and _ in parts separated by dots, and starts with a letter';
  elsif concurrency is null and rate is null then
    return 'concurrency: give it, or rate and per, or all of them; `tasker limit remove` removes a limit';
  elsif concurrency < 1 then
    return 'concurrency: must be at least 1; pause the queue to let nothing run';
  elsif rate < 1 then
    return 'rate: must be at least 1; pause the queue to let nothing run';
  elsif (rate is null) <> (per is null) or v_per < 1 or per > interval '1 year' then
    return 'per: goes with rate, and is from a millisecond to a year, such as 1s';
  end if;
  insert into tasker.limits as l (namespace, kind, name, concurrency, rate, per_ms)
  values (namespace, case when handler is null then 'namespace' else 'handler' end, v_name, concurrency, rate, v_per)
  on conflict on constraint limits_name_is_unique do update
  set concurrency = excluded.concurrency, rate = excluded.rate, per_ms = excluded.per_ms, tokens = null, filled_at = null;
  insert into tasker.audit (subject, action, actor, reason)
  values (concat_ws(', ', 'limit ' || v_name, concurrency || ' at once', rate || ' per ' || v_per || ' ms'),
    'set_limit', tasker.actor_name(actor), left(reason, 1000));
  perform pg_notify('tasker', 'admit');
  return 'accepted';
end
$$;

-- Creates a schedule, or changes the one of that name. Answers created, changed or unchanged.
-- What only a calendar can say (a cron that never fires, an unknown time zone) an orchestrator
-- writes into `problem` a moment later; `tasker schedule set` refuses it at once.
create or replace function tasker.set_schedule(
  namespace text, name text, template text, cron text default null, time_zone text default null,
  every interval default null, once_at timestamptz default null, version text default null,
  input jsonb default '{}', priority int default 0, missed text default 'run_once', overlap text default 'allow',
  paused boolean default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_every   bigint := case when every is not null then extract(epoch from least(greatest(every, interval '0'), interval '1000 years')) * 1000 end;
  v_zone    text := case when cron is not null then coalesce(time_zone, 'UTC') end;
  v_known   tasker.schedules;
  v_problem text;
  v_id      uuid;
  v_answer  text;
  v_timing  boolean;
begin
  if namespace is not null and not tasker.may_use(namespace) then
    raise exception 'namespace: this role may not use it; ask for a row in tasker.role_namespaces' using errcode = '42501';
  end if;
  v_problem := case
    when tasker.namespace_problem(namespace) is not null then tasker.namespace_problem(namespace)
    when name is null or name !~ '^[a-z][a-z0-9_]{0,39}$' then 'name: must match ^[a-z][a-z0-9_]{0,39}$'
    when not exists (select from tasker.templates t where t.namespace = set_schedule.namespace and t.name = set_schedule.template
                     and (set_schedule.version is null or t.version = set_schedule.version))
      then format('template: no template %s%s is registered in namespace %s; register it first', left(template, 40), coalesce(' version ' || left(version, 64), ''), namespace)
    when num_nonnulls(cron, every, once_at) <> 1 then 'cron, every, once_at: give exactly one of the three'
    when time_zone is not null and cron is null then 'time_zone: is for cron only'
    when octet_length(cron) > 200 then 'cron: has more than 200 bytes'
    when octet_length(time_zone) > 100 then 'time_zone: has more than 100 bytes'
    when v_every < 1000 then 'every: must be a second at least'
    when every > interval '100 years' then 'every: must be 100 years at most'
    when once_at >= '10000-01-01Z' then 'once_at: must be before the year 10000'
    when once_at <= clock_timestamp() then 'once_at: is in the past, so it would never fire'
    when missed is null or missed not in ('skip', 'run_once', 'run_all') then 'missed: must be skip, run_once or run_all'
    when overlap is null or overlap not in ('allow', 'skip', 'cancel_previous') then 'overlap: must be allow, skip or cancel_previous'
    when priority is null or priority not between -9999 and 9999 then 'priority: must be a whole number from -9999 to 9999; higher runs first'
    when jsonb_typeof(input) is distinct from 'object' then 'input: must be a JSON object'
    else 'input: ' || tasker.payload_problem(input, tasker.max_payload_bytes())
  end;
  if v_problem is not null then
    raise exception '%', v_problem using errcode = '22023';
  end if;

  select s.* into v_known from tasker.schedules s where s.namespace = set_schedule.namespace and s.name = set_schedule.name for no key update;
  if v_known.schedule_uuid is null then
    insert into tasker.schedules as s (namespace, name, template, version, input, priority, cron, time_zone, every_ms, once_at, missed, overlap, paused)
    values (namespace, name, template, version, input, priority, cron, v_zone, v_every, once_at, missed, overlap, coalesce(paused, false))
    returning s.schedule_uuid into v_id;
    v_answer := 'created';
    v_timing := true;
  else
    v_id := v_known.schedule_uuid;
    v_timing := (v_known.cron, v_known.time_zone, v_known.every_ms, v_known.once_at) is distinct from (cron, v_zone, v_every, once_at);
    if not v_timing and (v_known.template, v_known.version, v_known.input, v_known.priority, v_known.missed, v_known.overlap, v_known.paused)
      is not distinct from (template, version, input, priority, missed, overlap, coalesce(paused, v_known.paused)) then
      return 'unchanged';
    end if;
    update tasker.schedules s
    set template = set_schedule.template, version = set_schedule.version, input = set_schedule.input, priority = set_schedule.priority,
        cron = set_schedule.cron, time_zone = v_zone, every_ms = v_every, once_at = set_schedule.once_at,
        anchor_at = case when v_timing then clock_timestamp() else s.anchor_at end,
        missed = set_schedule.missed, overlap = set_schedule.overlap, paused = coalesce(set_schedule.paused, s.paused)
    where s.schedule_uuid = v_id;
    v_answer := 'changed';
    v_timing := v_timing or (v_known.paused and not coalesce(paused, v_known.paused));
  end if;
  if v_timing then
    perform tasker.plan_schedule(v_id);
  end if;
  insert into tasker.audit (subject, action, actor) values (format('schedule %s/%s', namespace, name), 'schedule.' || v_answer, tasker.actor_name(actor));
  return v_answer;
end
$$;

-- A paused schedule forgets its ticks: what would have run meanwhile is not missed.
create or replace function tasker.pause_schedule(
  namespace text, name text, pause boolean default true, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_known tasker.schedules;
begin
  if pause is null then
    return 'pause: must be true or false';
  end if;
  select s.* into v_known from tasker.schedules s
  where s.namespace = pause_schedule.namespace and s.name = pause_schedule.name and tasker.may_use(s.namespace) for no key update;
  if v_known.schedule_uuid is null then
    return 'no such schedule';
  end if;
  if v_known.paused is distinct from pause then
    update tasker.schedules s set paused = pause where s.schedule_uuid = v_known.schedule_uuid;
    if not pause then
      perform tasker.plan_schedule(v_known.schedule_uuid);
    end if;
    insert into tasker.audit (subject, action, actor, reason)
    values (format('schedule %s/%s', namespace, name), case when pause then 'schedule.pause' else 'schedule.resume' end, tasker.actor_name(actor), left(reason, 1000));
  end if;
  return 'accepted';
end
$$;

-- Removes a schedule; tasks it has submitted stay.
create or replace function tasker.delete_schedule(
  namespace text, name text, reason text default null, actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  delete from tasker.schedules s
  where s.namespace = delete_schedule.namespace and s.name = delete_schedule.name and tasker.may_use(s.namespace);
  if not found then
    return 'no such schedule';
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values (format('schedule %s/%s', namespace, name), 'schedule.delete', tasker.actor_name(actor), left(reason, 1000));
  return 'accepted';
end
$$;

-- Runs a schedule now, whether or not it is paused; its next tick comes as if nothing had been.
create or replace function tasker.trigger_schedule(
  namespace text, name text, reason text default null, actor text default session_user,
  out task_uuid uuid, out problem text
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_id uuid;
begin
  select s.schedule_uuid into v_id from tasker.schedules s
  where s.namespace = trigger_schedule.namespace and s.name = trigger_schedule.name and tasker.may_use(s.namespace);
  if v_id is null then
    problem := 'no such schedule';
    return;
  end if;
  select f.task_uuid, f.problem into task_uuid, problem from tasker.fire_schedule(v_id, clock_timestamp(), 'trigger') f;
  if task_uuid is not null then
    insert into tasker.audit (task_uuid, subject, action, actor, reason)
    values (task_uuid, format('schedule %s/%s', namespace, name), 'schedule.trigger', tasker.actor_name(actor), left(reason, 1000));
  end if;
end
$$;

-- A time before all clocks has no tasks, and its uuids none that could be compared.
update tasker.retention set keep = case when keep <= interval '50 years' then keep end,
  keep_quarantine = case when keep_quarantine <= interval '50 years' then keep_quarantine end
where keep > interval '50 years' or keep_quarantine > interval '50 years';
alter table tasker.retention add constraint retention_keeps_fifty_years_at_most
  check (keep <= interval '50 years' and keep_quarantine <= interval '50 years');

create or replace function tasker.set_retention(
  namespace text, keep interval default null, keep_quarantine interval default null, archive boolean default false,
  actor text default session_user
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if not tasker.is_owner() then
    raise exception 'namespace: only the owner of the schema sets retention' using errcode = '42501';
  end if;
  if namespace is distinct from '*' and tasker.namespace_problem(namespace) is not null then
    raise exception 'namespace: must match ^[a-z](_?[a-z0-9])*$, or be * for all that have no policy of their own' using errcode = '22023';
  end if;
  if keep not between interval '1 h' and interval '50 years' then
    raise exception 'keep: must be an hour at least and 50 years at most; null keeps for ever' using errcode = '22023';
  end if;
  if keep_quarantine not between interval '1 h' and interval '50 years' then
    raise exception 'keep_quarantine: must be an hour at least and 50 years at most; null keeps for ever' using errcode = '22023';
  end if;
  if keep is null and keep_quarantine is null then
    delete from tasker.retention r where r.namespace = set_retention.namespace;
  else
    insert into tasker.retention as r (namespace, keep, keep_quarantine, archive)
    values (namespace, keep, keep_quarantine, coalesce(archive, false))
    on conflict on constraint retention_pkey do update
    set keep = excluded.keep, keep_quarantine = excluded.keep_quarantine, archive = excluded.archive;
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('retention ' || namespace, 'retention.set', tasker.actor_name(actor),
    format('keep %s, quarantine %s%s', coalesce(justify_hours(keep)::text, 'for ever'), coalesce(justify_hours(keep_quarantine)::text, 'for ever'), case when archive then ', archive' else '' end));
end
$$;

-- Sets the share of a namespace (or of `*`), audited; null forgets it. What lies outside 0 to 1
-- is clamped with a warning. Returns what holds.
create or replace function tasker.set_sampling(
  namespace text, ratio double precision, actor text default session_user
) returns double precision
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_ratio double precision := case when ratio = 'NaN' then 1 else greatest(0, least(1, ratio)) end;
begin
  if not tasker.is_owner() then
    raise exception 'sampling: only the owner of the schema may set it' using errcode = '42501';
  end if;
  if namespace is distinct from '*' and tasker.namespace_problem(namespace) is not null then
    raise exception 'namespace: must be a namespace, or * for every other one' using errcode = '22023';
  end if;
  if ratio is null then
    v_ratio := null;
    delete from tasker.sampling s where s.namespace = set_sampling.namespace;
  else
    if v_ratio <> ratio then
      raise warning 'ratio: % is not between 0 and 1; % is used', ratio, v_ratio;
    end if;
    insert into tasker.sampling (namespace, ratio) values (set_sampling.namespace, v_ratio)
    on conflict on constraint sampling_pkey do update set ratio = excluded.ratio;
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('sampling of ' || set_sampling.namespace, 'set_sampling', tasker.actor_name(set_sampling.actor), coalesce(v_ratio::text, 'default'));
  return v_ratio;
end
$$;

-- Merges values into a scope (null forgets a key), audited, and wakes every process. All or
-- nothing.
create or replace function tasker.set_trace_settings(
  settings jsonb, scope text default '*', actor text default session_user
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if not tasker.is_owner() then
    raise exception 'trace settings: only the owner of the schema may set them' using errcode = '42501';
  end if;
  if jsonb_typeof(settings) is distinct from 'object' then
    raise exception 'settings: must be a JSON object of texts by key' using errcode = '22023';
  end if;
  if scope is distinct from '*' and tasker.namespace_problem(scope) is not null then
    raise exception 'scope: must be a namespace, or * for every process' using errcode = '22023';
  end if;
  if exists (select from jsonb_object_keys(settings) k where k !~ '^[a-z][a-z0-9_.]*$' or octet_length(k) > 100) then
    raise exception 'settings: a key is no name; `tasker trace status` shows those that are known' using errcode = '22023';
  end if;
  delete from tasker.trace_settings t
  where t.scope = set_trace_settings.scope
    and t.key in (select e.key from jsonb_each(settings) e where e.value = 'null');
  insert into tasker.trace_settings (scope, key, value, set_by)
  select set_trace_settings.scope, e.key, e.value, tasker.actor_name(set_trace_settings.actor)
  from jsonb_each_text(settings) e where e.value is not null
  on conflict on constraint trace_settings_pkey
    do update set value = excluded.value, set_at = excluded.set_at, set_by = excluded.set_by;
  insert into tasker.audit (subject, action, actor, reason)
  values ('traces of ' || set_trace_settings.scope, 'set_trace_settings', tasker.actor_name(set_trace_settings.actor), left(settings::text, 1000));
  perform pg_notify('tasker', 'trace');
exception
  when check_violation then
    raise exception 'settings: a value is too long, holds a control character or a password, or is not one that may be stored there'
      using errcode = '22023';
end
$$;

-- Sets it; null takes it away. Checked by whoever reads it: `tasker redaction set` refuses a bad one.
create or replace function tasker.set_redaction(policy jsonb, actor text default session_user) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if not tasker.is_owner() then
    raise exception 'policy: only the owner of the schema sets it' using errcode = '42501';
  end if;
  if policy is not null and (jsonb_typeof(policy) <> 'object' or jsonb_typeof(policy->'version') is distinct from 'string'
      or tasker.payload_problem(policy, 65536) is not null) then
    raise exception 'policy: must be a JSON object with a version, of 64 KiB at most' using errcode = '22023';
  end if;
  if policy is null then
    delete from tasker.redaction;
  else
    insert into tasker.redaction (policy) values (policy)
    on conflict on constraint redaction_pkey do update set policy = excluded.policy;
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('redaction', 'redaction.set', tasker.actor_name(actor), left(coalesce(policy->>'version', 'built-in'), 1000));
end
$$;

-- Makes a key. What was long over is forgotten.
create or replace function tasker.create_api_key(
  p_key_id text, p_name text, p_secret_hash bytea, p_role text, p_scopes text[], p_namespaces text[],
  p_expires_at timestamptz, p_actor text
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_problem text := coalesce(tasker.name_problem('p_key_id', p_key_id, 64), tasker.name_problem('p_name', p_name, 100),
    case when p_secret_hash is null or length(p_secret_hash) <> 32 then 'p_secret_hash: must have 32 bytes'
      when p_role is null or p_role not in ('viewer', 'operator', 'admin') then 'p_role: must be viewer, operator or admin'
      when array_position(p_scopes, null) is not null then 'p_scopes: must hold no null'
      when cardinality(p_namespaces) = 0 or array_position(p_namespaces, null) is not null
        then 'p_namespaces: name at least one, without nulls, or null for all'
      when p_expires_at >= '10000-01-01Z' or p_expires_at < '1970-01-01Z' then 'p_expires_at: must be before the year 10000' end);
begin
  if v_problem is not null then
    raise exception '%', v_problem using errcode = '22023';
  end if;
  delete from tasker.api_sessions where expires_at < clock_timestamp();
  delete from tasker.api_keys k
  where least(k.expires_at, k.revoked_at) < clock_timestamp() - interval '90 days';
  -- A name is taken until its key is over.
  update tasker.api_keys k set revoked_at = k.expires_at
  where k.name = p_name and k.revoked_at is null and k.expires_at < clock_timestamp();
  insert into tasker.api_keys (key_id, name, secret_hash, role, scopes, namespaces, expires_at, created_by)
  values (p_key_id, p_name, p_secret_hash, p_role, p_scopes, p_namespaces, p_expires_at, tasker.actor_name(p_actor));
  insert into tasker.audit (subject, action, actor, details)
  values ('key ' || p_name, 'create', tasker.actor_name(p_actor),
    jsonb_build_object('key_id', p_key_id, 'role', p_role, 'scopes', p_scopes, 'namespaces', p_namespaces, 'expires_at', p_expires_at));
end
$$;

-- Revokes the key of this name or id; false if no valid key has it.
create or replace function tasker.revoke_api_key(p_name text, p_actor text) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text;
begin
  update tasker.api_keys k set revoked_at = clock_timestamp()
  where (k.name = p_name or k.key_id = p_name) and k.revoked_at is null
  returning k.name into v_name;
  if v_name is null then
    return false;
  end if;
  insert into tasker.audit (subject, action, actor) values ('key ' || v_name, 'revoke', tasker.actor_name(p_actor));
  return true;
end
$$;

revoke all on function tasker.name_problem, tasker.namespace_problem, tasker.queues_problem, tasker.handlers_problem,
  tasker.actor_name, tasker.may_speak_for, tasker.kept_progress from public;
