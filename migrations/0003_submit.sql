-- How a task is asked for, from SQL, in the caller's own transaction.

-- A role that is not a member of the owner's may act only in the namespaces named here.
create table tasker.role_namespaces (
  role_name  name not null,
  namespace  text not null,
  primary key (role_name, namespace)
);

-- These small ones are PL/pgSQL because it keeps their plans; a SQL function with a
-- `search_path` of its own is neither inlined nor planned once.
create function tasker.is_owner() returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return pg_has_role(session_user, (select nspowner from pg_namespace where nspname = 'tasker'), 'member');
end
$$;

create function tasker.may_use(p_namespace text) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return tasker.is_owner()
      or exists (select from tasker.role_namespaces r
                 where r.namespace = p_namespace and pg_has_role(session_user, r.role_name, 'member'));
end
$$;

-- `alter database … set tasker.max_payload_bytes = …` changes it.
create function tasker.max_payload_bytes() returns int
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce(nullif(current_setting('tasker.max_payload_bytes', true), '')::int, 1048576);
end
$$;

-- Why a payload cannot be kept, or null. PostgreSQL holds numbers and depths that other
-- programs cannot read back, and one such value would fail every batch that it is part of.
create function tasker.payload_problem(p jsonb, p_limit int) returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
  select case
    when octet_length(t) > p_limit then format('has %s bytes, the limit is %s; store it elsewhere and pass a reference', octet_length(t), p_limit)
    -- 65 levels take 130 brackets, so what is short is not looked at twice.
    when octet_length(t) > 130 and jsonb_path_exists(p, 'strict $.**{65}') then 'nests deeper than 64 levels; flatten it, or store it elsewhere and pass a reference'
    -- And a number beyond a double's range takes 309 digits.
    when octet_length(t) > 308
      and jsonb_path_exists(p, 'strict $.** ? (@.type() == "number" && (@ > 1.7976931348623157e308 || @ < -1.7976931348623157e308))')
      then 'holds a number beyond 1.797e308; write it as text'
  end
  from (select p::text as t) s
$$;

create function tasker.is_uuid(p text) returns boolean
language sql immutable parallel safe
as $$ select p ~ '^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$' $$;

-- The time that a text names, or null: also for infinity, and for a year of five digits, which
-- PostgreSQL holds and calendars and RFC 3339 do not.
create function tasker.try_timestamptz(p text) returns timestamptz
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_time timestamptz;
begin
  v_time := p::timestamptz;
  return case when v_time > '-infinity' and v_time < '10000-01-01Z' then v_time end;
exception when others then
  return null;
end
$$;

-- docs/telemetry.md "Ids": the first 8 bytes of SHA-256 over what names the span; zero -> 1.
create function tasker.span_id(
  p_trace_id bytea, p_entity uuid, p_generation bigint, p_attempt bigint, p_kind int, p_ordinal bigint
) returns bytea
language sql immutable parallel safe
as $$
  -- One expression, so that the planner inlines it.
  select coalesce(nullif(substring(sha256(
    'tasker-span-v1'::bytea || p_trace_id || uuid_send(p_entity) || int8send(p_generation)
    || int8send(p_attempt) || substring(int4send(p_kind) from 4) || int8send(p_ordinal)) from 1 for 8),
    '\x0000000000000000'::bytea), '\x0000000000000001'::bytea)
$$;

-- W3C Trace Context: version 00 exactly, a later version may carry more; lower-case hex only.
create function tasker.is_traceparent(p text) returns boolean
language sql immutable parallel safe
as $$
  select p ~ '^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}|(?!00|ff)[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?)$'
     and substring(p from 4 for 32) <> repeat('0', 32)
     and substring(p from 37 for 16) <> repeat('0', 16)
$$;

-- What others may be given on: W3C's longest, and printable.
create function tasker.is_tracestate(p text) returns boolean
language sql immutable parallel safe
as $$ select octet_length(p) <= 512 and p !~ '[^\x20-\x7e]' $$;

create function tasker.is_baggage(p text) returns boolean
language sql immutable parallel safe
as $$ select octet_length(p) <= 8192 and length(p) - length(replace(p, ',', '')) < 64 $$;

create type tasker.submission as (
  ordinal int, error text, task_uuid uuid, is_new boolean, namespace text, template_id int, input jsonb,
  correlation_id text, idempotency_key text, request_hash bytea, priority int, run_at timestamptz,
  trace_id bytea, remote_span_id bytea, trace_flags smallint, tracestate text, baggage text
);

-- Requests have the keys of a `submit` message, plus traceparent, tracestate and baggage.
-- Set-based; a bad request gets an error in its own row and nothing else.
create function tasker.submit_tasks(p_requests jsonb)
returns table (ordinal int, task_uuid uuid, is_new boolean, error text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_at     timestamptz := clock_timestamp();
  v_limit  int := tasker.max_payload_bytes();
  v_owner  boolean := tasker.is_owner();
  v_items  tasker.submission[];
  v_bad    bigint[];
begin
  if jsonb_typeof(p_requests) is distinct from 'array' then
    raise exception 'requests: must be a JSON array of submit requests' using errcode = '22023';
  end if;

  with request as (
    select o.ordinality::int as ordinal, o.r,
           o.r->>'namespace' as namespace, o.r->>'template' as template, o.r->>'version' as version,
           coalesce(nullif(o.r->'input', 'null'), '{}'::jsonb) as input,
           o.r->>'correlation_id' as correlation_id, o.r->>'idempotency_key' as idempotency_key,
           o.r->>'run_at' as run_at, o.r->>'traceparent' as traceparent,
           tasker.uuid7() as task_uuid
    from jsonb_array_elements(p_requests) with ordinality as o(r, ordinality)
  ), found as (
    select q.*, t.template_id, case when octet_length(q.input::text) > 130 then tasker.payload_problem(q.input, v_limit) end as problem,
           case when q.run_at is not null then tasker.try_timestamptz(q.run_at) end as run_at_time,
           tasker.is_traceparent(q.traceparent) as joins
    from request q
    left join lateral (
      select t.template_id from tasker.templates t
      where t.namespace = q.namespace and t.name = q.template and (q.version is null or t.version = q.version)
      order by t.template_id desc limit 1
    ) t on true
  )
  select array_agg(row(
    f.ordinal,
    case
      when jsonb_typeof(f.r) <> 'object' then 'request: must be a JSON object'
      when f.namespace is null then 'namespace: is missing'
      when not (v_owner or tasker.may_use(f.namespace)) then 'namespace: this role may not use it; ask for a row in tasker.role_namespaces'
      when f.template is null then 'template: is missing'
      when f.template_id is null then format('template: no template %s%s is registered in namespace %s; `tasker template list` shows those that are',
        left(f.template, 40), coalesce(' version ' || left(f.version, 64), ''), left(f.namespace, 40))
      when jsonb_typeof(f.input) <> 'object' then format('input: must be a JSON object, not %s', jsonb_typeof(f.input))
      when f.problem is not null then 'input: ' || f.problem
      when f.correlation_id is not null and (octet_length(f.correlation_id) not between 1 and 200 or f.correlation_id ~ '[[:cntrl:]]')
        then 'correlation_id: must have 1 to 200 bytes and no control characters'
      when f.idempotency_key is not null and (octet_length(f.idempotency_key) not between 1 and 200 or f.idempotency_key ~ '[[:cntrl:]]')
        then 'idempotency_key: must have 1 to 200 bytes and no control characters'
      when f.r->'priority' is not null and f.r->>'priority' is not null and (f.r->>'priority') !~ '^-?[0-9]{1,4}$'
        then 'priority: must be a whole number from -9999 to 9999; higher runs first'
      when f.run_at is not null and f.run_at_time is null then 'run_at: must be a time such as 2030-01-31T12:00:00Z'
    end,
    f.task_uuid, true, f.namespace, f.template_id, f.input,
    coalesce(f.correlation_id, f.task_uuid::text), f.idempotency_key,
    case when f.idempotency_key is not null
      then sha256(convert_to(concat_ws('|', f.template, coalesce(f.version, ''), f.input::text), 'UTF8')) end,
    case when (f.r->>'priority') ~ '^-?[0-9]{1,4}$' then (f.r->>'priority')::int else 0 end,
    case when f.run_at_time > v_at then f.run_at_time end,
    case when f.joins then decode(substring(f.traceparent from 4 for 32), 'hex')
      -- 16 random bytes: a uuid's fixed bits sit where ratio samplers look.
      else substring(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())) from 1 for 16) end,
    case when f.joins then decode(substring(f.traceparent from 37 for 16), 'hex') end,
    case when f.joins then (get_byte(decode(substring(f.traceparent from 54 for 2), 'hex'), 0) & 1)::smallint else 1::smallint end,
    case when f.joins and tasker.is_tracestate(f.r->>'tracestate') then f.r->>'tracestate' end,
    case when tasker.is_baggage(f.r->>'baggage') then f.r->>'baggage' end
  )::tasker.submission order by f.ordinal)
  into v_items
  from found f;

  if v_items is null then
    return;
  end if;
  if exists (select from tasker.sampling) then
    v_items := tasker.sample(v_items);
  end if;

  select array[count(*) filter (where not tasker.is_traceparent(r->>'traceparent')),
    count(*) filter (where not tasker.is_tracestate(r->>'tracestate')),
    count(*) filter (where not tasker.is_baggage(r->>'baggage'))]
  into v_bad from jsonb_array_elements(p_requests) r;
  if 0 < any (v_bad) then
    insert into tasker.counters (name, n)
    select b.name, b.n from unnest(array['invalid_traceparent', 'invalid_tracestate', 'invalid_baggage'], v_bad) b(name, n)
    where b.n > 0;
  end if;

  if exists (select from unnest(v_items) i where i.idempotency_key is not null and i.error is null) then
    insert into tasker.idempotency_keys (namespace, key, task_uuid, request_hash)
    select i.namespace, i.idempotency_key, i.task_uuid, i.request_hash
    from unnest(v_items) i where i.idempotency_key is not null and i.error is null
    order by i.namespace, i.idempotency_key, i.ordinal
    on conflict do nothing;

    -- A statement of its own, so that it sees the keys other transactions won meanwhile.
    select array_agg(row(
      i.ordinal,
      case when i.error is null and k.task_uuid <> i.task_uuid and k.request_hash <> i.request_hash
        then format('idempotency_key: was used for task %s with another template, version or input; use a new key', k.task_uuid)
        else i.error end,
      case when i.error is null then coalesce(k.task_uuid, i.task_uuid) else i.task_uuid end,
      k.task_uuid is null or k.task_uuid = i.task_uuid,
      i.namespace, i.template_id, i.input,
      i.correlation_id, i.idempotency_key, i.request_hash, i.priority, i.run_at,
      i.trace_id, i.remote_span_id, i.trace_flags, i.tracestate, i.baggage)::tasker.submission order by i.ordinal)
    into v_items
    from unnest(v_items) i
    left join tasker.idempotency_keys k on k.namespace = i.namespace and k.key = i.idempotency_key;
  end if;

  insert into tasker.tasks (task_uuid, namespace, template_id, correlation_id, idempotency_key, priority, input,
    trace_id, root_span_id, remote_span_id, trace_flags, tracestate, baggage,
    created_at, run_at, generation_began_at, last_at)
  select i.task_uuid, i.namespace, i.template_id, i.correlation_id, i.idempotency_key, i.priority, i.input,
    i.trace_id, tasker.span_id(i.trace_id, i.task_uuid, 1, 0, 1, 0), i.remote_span_id, i.trace_flags, i.tracestate, i.baggage,
    v_at, i.run_at, v_at, v_at
  from unnest(v_items) i where i.error is null and i.is_new;

  if exists (select from unnest(v_items) i where i.error is null and i.is_new and i.run_at is null) then
    insert into pgmq.q_task_requests (vt, message)
    select v_at, jsonb_build_object('v', 1, 'type', 'start', 'task', i.task_uuid)
    from unnest(v_items) i where i.error is null and i.is_new and i.run_at is null;
    perform tasker.wake('task_requests');
  end if;
  if exists (select from unnest(v_items) i where i.error is null and i.is_new and i.run_at is not null) then
    insert into tasker.due (due_at, kind, task_uuid)
    select i.run_at, 'start', i.task_uuid from unnest(v_items) i
    where i.error is null and i.is_new and i.run_at is not null;
    -- Sweep sleeps until the earliest due time it knows: only an earlier one wakes it.
    perform pg_notify('tasker', 'due')
    from (select min(i.run_at) as at from unnest(v_items) i where i.error is null and i.is_new) n
    where not exists (select from tasker.due d where d.due_at < n.at);
  end if;

  return query
    select i.ordinal, case when i.error is null then i.task_uuid end, i.error is null and i.is_new, i.error
    from unnest(v_items) i order by i.ordinal;
end
$$;

create function tasker.submit_task(
  namespace text, template text, version text default null, input jsonb default '{}',
  correlation_id text default null, idempotency_key text default null, priority int default null,
  run_at timestamptz default null, traceparent text default null, tracestate text default null,
  baggage text default null
) returns uuid
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_task uuid;
  v_error text;
begin
  select s.task_uuid, s.error into v_task, v_error
  from tasker.submit_tasks(jsonb_build_array(jsonb_build_object(
    'namespace', namespace, 'template', template, 'version', version, 'input', input,
    'correlation_id', correlation_id, 'idempotency_key', idempotency_key, 'priority', priority,
    'run_at', run_at, 'traceparent', traceparent, 'tracestate', tracestate, 'baggage', baggage))) s;
  if v_error is not null then
    raise exception '%', v_error using errcode = '22023';
  end if;
  return v_task;
end
$$;
