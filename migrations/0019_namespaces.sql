-- What a namespace may do in another, and how many open tasks it may have: docs/adr/0009.

-- Who answers for a template's steps that start tasks in another namespace: who registered it. Null in
-- both: the owner of the schema. A role that is no owner is recorded by its name; a key of the HTTP API
-- by its name, so that a new key of that name takes the place of one that was revoked.
alter table tasker.templates add column registered_role name, add column registered_key text;

-- The namespaces, beside its own, in which a definition starts tasks, each with the first step that does.
create function tasker.crossings(p_namespace text, p_definition jsonb) returns table (namespace text, step text)
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
  select distinct on (s.step->'task'->>'namespace') s.step->'task'->>'namespace', s.step->>'name'
  from jsonb_array_elements(case when jsonb_typeof(p_definition->'steps') = 'array' then p_definition->'steps' else '[]' end)
    with ordinality s(step, place)
  where s.step->'task'->>'namespace' <> p_namespace
  order by s.step->'task'->>'namespace', s.place
$$;

-- Who of those that answer for a template may not use a namespace now, in words; null: all of them may.
-- Called for a crossing only, so a task that stays in its namespace never pays for it.
create function tasker.barred(p_role name, p_key text, p_namespace text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_key is not null and not exists (
    select from tasker.api_keys k
    where k.name = p_key and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp())
      and (k.namespaces is null or p_namespace = any(k.namespaces))) then
    return format('the API key %s', left(p_key, 100));
  end if;
  if p_role is not null and not exists (
    select from pg_roles r
    where r.rolname = p_role and (
      pg_has_role(r.oid, (select n.nspowner from pg_namespace n where n.nspname = 'tasker'), 'member')
      or exists (select from tasker.role_namespaces g join pg_roles m on m.rolname = g.role_name
                 where g.namespace = p_namespace and pg_has_role(r.oid, m.oid, 'member')))) then
    return format('the role %s', p_role);
  end if;
  return null;
end
$$;

-- Every door at which a template is registered passes here: it writes who registers it, and refuses a
-- step that starts tasks where that one may not.
create function tasker.check_template_crossings() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_step      text;
  v_namespace text;
  v_barred    text;
begin
  new.registered_role := case when not tasker.is_owner() then session_user end;
  select c.step, c.namespace, b.barred into v_step, v_namespace, v_barred
  from tasker.crossings(new.namespace, new.definition) c
  cross join lateral (select tasker.barred(new.registered_role, new.registered_key, c.namespace) as barred) b
  where b.barred is not null limit 1;
  if v_barred is not null then
    raise exception 'steps: step % starts a task in namespace %, which % may not use; let somebody who may use both apply the template',
      v_step, v_namespace, v_barred using errcode = '42501';
  end if;
  return new;
end
$$;
create trigger check_template_crossings before insert on tasker.templates
  for each row execute function tasker.check_template_crossings();

-- Somebody applies a template again that is there already. Where who registered it may no longer do
-- what its steps ask for, and the caller may, the caller answers for it from now on; true then.
create function tasker.adopt_template(p_template_id int, p_key text default null, p_actor text default session_user) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_role name := case when not tasker.is_owner() then session_user end;
  v_row  tasker.templates;
begin
  select t.* into v_row from tasker.templates t where t.template_id = p_template_id for no key update;
  if not exists (select from tasker.crossings(v_row.namespace, v_row.definition) c
                 where tasker.barred(v_row.registered_role, v_row.registered_key, c.namespace) is not null)
    or not (tasker.may_use(v_row.namespace) and tasker.barred(v_role, p_key, v_row.namespace) is null)
    or exists (select from tasker.crossings(v_row.namespace, v_row.definition) c
               where tasker.barred(v_role, p_key, c.namespace) is not null) then
    return false;
  end if;
  update tasker.templates t set registered_role = v_role, registered_key = p_key where t.template_id = p_template_id;
  insert into tasker.audit (subject, action, actor)
  values (format('template %s/%s %s', v_row.namespace, v_row.name, v_row.version), 'template.adopt', tasker.actor_name(p_actor));
  return true;
end
$$;

-- Why a task of this template may not start one in another namespace, or null.
create function tasker.crossing_problem(p_template_id int, p_namespace text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_row    tasker.templates;
  v_barred text;
begin
  select t.* into v_row from tasker.templates t where t.template_id = p_template_id;
  if not found then
    return 'namespace: the template that asks for it is not registered any more; register it again';
  end if;
  v_barred := tasker.barred(v_row.registered_role, v_row.registered_key, p_namespace);
  return case when v_barred is not null then
    format('namespace: template %s/%s %s was registered by %s, who may not use namespace %s; let somebody who may use both apply it again',
      v_row.namespace, v_row.name, v_row.version, v_barred, p_namespace) end;
end
$$;

-- Until now a key could name any namespace in a template. Those that a key registered for namespaces
-- that it did not have stop here; all others are the owner's. The audit says which.
update tasker.templates t set registered_key = k.name
from tasker.api_keys k
where exists (select from tasker.crossings(t.namespace, t.definition) c where c.namespace <> all(k.namespaces))
  and k.key_id = (
    select o.key_id from tasker.api_keys o
    where o.created_at <= t.created_at and o.name = (
      select a.actor from tasker.audit a
      where a.action = 'template.apply' and a.subject = format('template %s/%s %s', t.namespace, t.name, t.version)
      order by a.audit_id limit 1)
    order by o.created_at desc limit 1);

-- At most so many open tasks. A table of its own: older programs read every row of tasker.limits.
create table tasker.open_tasks_limits (
  namespace   text primary key,
  open_tasks  int not null,
  constraint open_tasks_limits_are_bounded check (open_tasks between 1 and 1000000)
);

-- What is counted under such a limit. Its columns never change while a task is open, and the end of a
-- task is no HOT update anyway, because of `tasks_open`.
create index tasks_open_by_namespace on tasker.tasks (namespace) where finished_at is null;

-- The open tasks of a namespace, counted no further than asked for.
create function tasker.open_tasks(p_namespace text, p_most int) returns int
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan
as $$
begin
  return (select count(*) from (
    select from tasker.tasks t where t.namespace = p_namespace and t.finished_at is null limit p_most) c);
end
$$;

-- Of the new tasks among these, those beyond their namespace's limit get an error; the first in order
-- are let through. Nobody waits for anybody: transactions that submit at the same time do not see each
-- other's tasks, so each of them may bring as many as there was room for when it looked.
--
-- A task that a running one of its own namespace waits for is counted and let through: refused, it would
-- fail the work that was accepted. Only tasker.start_children says so, and only the owner calls that: the
-- setting alone is anybody's to make.
create function tasker.refuse_beyond_limit(p_items tasker.submission[], p_requests jsonb) returns tasker.submission[]
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_nested  boolean := tasker.is_owner() and coalesce(current_setting('tasker.starting_children', true) = 'on', false);
  v_refused uuid[];
  v_items   tasker.submission[];
begin
  select array_agg(n.task_uuid) into v_refused
  from (
    select i.task_uuid, l.namespace, row_number() over (partition by l.namespace order by i.ordinal) as place
    from unnest(p_items) i join tasker.open_tasks_limits l on l.namespace = i.namespace
    where i.error is null and i.is_new
      and not (v_nested and coalesce((p_requests->(i.ordinal - 1)->>'exempt')::boolean, false))
  ) n
  join (
    select l.namespace, l.open_tasks - tasker.open_tasks(l.namespace, l.open_tasks) as room
    from tasker.open_tasks_limits l
    where l.namespace in (select i.namespace from unnest(p_items) i where i.error is null and i.is_new)
  ) r on r.namespace = n.namespace
  where n.place > r.room;
  if v_refused is null then
    return p_items;
  end if;

  -- Taken a moment ago, for a task that will not be.
  delete from tasker.idempotency_keys k
  using unnest(p_items) i
  where i.task_uuid = any(v_refused) and k.namespace = i.namespace and k.key = i.idempotency_key and k.task_uuid = i.task_uuid;

  -- The same key twice in one batch is the same task, and the same refusal.
  select array_agg(row(
    i.ordinal,
    case when i.error is null and i.task_uuid = any(v_refused)
      then format('namespace: %s has %s open tasks, its limit; submit again when some have ended, or raise it: `tasker limit set %s --open-tasks N`',
        i.namespace, l.open_tasks, i.namespace)
      else i.error end,
    i.task_uuid, i.is_new, i.namespace, i.template_id, i.input,
    i.correlation_id, i.idempotency_key, i.request_hash, i.priority, i.run_at,
    i.trace_id, i.remote_span_id, i.trace_flags, i.tracestate, i.baggage)::tasker.submission order by i.ordinal)
  into v_items
  from unnest(p_items) i left join tasker.open_tasks_limits l on l.namespace = i.namespace;
  return v_items;
end
$$;

-- Sets how many open tasks a namespace may have; null removes the limit. What is open stays. Only the
-- owner, because it protects the others from this namespace. Returns 'accepted', or why not.
create function tasker.set_open_tasks_limit(
  p_namespace text, p_open_tasks int, p_reason text default null, p_actor text default session_user
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not tasker.is_owner() then
    return 'open_tasks: only the owner of the schema may set it';
  elsif tasker.namespace_problem(p_namespace) is not null then
    return tasker.namespace_problem(p_namespace);
  elsif p_open_tasks is not null and p_open_tasks not between 1 and 1000000 then
    return 'open_tasks: must be a number from 1 to 1000000';
  end if;
  if p_open_tasks is null then
    delete from tasker.open_tasks_limits l where l.namespace = p_namespace;
    if not found then
      return 'there is no such limit; `tasker limit list` shows those that are';
    end if;
  else
    insert into tasker.open_tasks_limits as l (namespace, open_tasks) values (p_namespace, p_open_tasks)
    on conflict (namespace) do update set open_tasks = excluded.open_tasks;
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values (concat_ws(', ', 'limit ' || p_namespace, p_open_tasks || ' open tasks'),
    case when p_open_tasks is null then 'remove_open_tasks_limit' else 'set_open_tasks_limit' end,
    tasker.actor_name(p_actor), left(p_reason, 1000));
  return 'accepted';
end
$$;

-- As in 0003, and what is beyond the limit of its namespace is refused.
create or replace function tasker.submit_tasks(p_requests jsonb)
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
  v_sampled boolean;
  v_capped  boolean;
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
  select exists (select from tasker.sampling), exists (select from tasker.open_tasks_limits) into v_sampled, v_capped;
  if v_sampled then
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

  -- Behind the keys, so that a task that exists is answered whatever the limit is.
  if v_capped then
    v_items := tasker.refuse_beyond_limit(v_items, p_requests);
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

-- As in 0013, and a task in another namespace needs the right to it.
create or replace function tasker.start_children(p_requests jsonb) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_asked jsonb;
begin
  select jsonb_agg(w.r || jsonb_build_object('number', w.number, 'depth', w.depth,
      'exempt', (w.r->>'awaited')::boolean and w.r->>'namespace' = p.namespace, 'problem', case
      when w.depth > 16 then 'it would be nested more than 16 deep; does a template start itself?'
      when w.number > 10000 then 'its task has started 10000 tasks, the limit; start them from several tasks'
      when w.r->>'namespace' is distinct from p.namespace then tasker.crossing_problem(p.template_id, w.r->>'namespace')
    end) order by w.ordinal)
  into v_asked
  from (
    select o.r, o.ordinality as ordinal,
      coalesce((select max(k.number) from tasker.children k where k.task_uuid = (o.r->>'task')::uuid), 0)
        + row_number() over (partition by o.r->>'task' order by o.ordinality) as number,
      coalesce((select k.depth from tasker.children k where k.child_uuid = (o.r->>'task')::uuid), 0) + 1 as depth
    from jsonb_array_elements(p_requests) with ordinality o(r, ordinality)
  ) w
  left join tasker.tasks p on p.task_uuid = (w.r->>'task')::uuid;

  -- Only now, and only of the owner, is `exempt` read: see tasker.refuse_beyond_limit.
  perform set_config('tasker.starting_children', 'on', true);
  with asked as materialized (
    select o.ordinality::int as ordinal, (o.r->>'task')::uuid as task_uuid, (o.r->>'step')::uuid as step_uuid,
      (o.r->>'attempt')::int as attempt, (o.r->>'number')::int as number, (o.r->>'depth')::int as depth,
      (o.r->>'awaited')::boolean as awaited, o.r->>'problem' as problem
    from jsonb_array_elements(v_asked) with ordinality o(r, ordinality)
  ), submitted as materialized (
    -- What must not be started is asked for without a name, and so is refused.
    select s.ordinal, s.task_uuid, s.error from tasker.submit_tasks((
      select jsonb_agg(case when o.r->>'problem' is null
        then o.r || jsonb_build_object('input', (select s.input from tasker.steps s where s.step_uuid = (o.r->>'step')::uuid))
        else '{}' end order by o.ordinality)
      from jsonb_array_elements(v_asked) with ordinality o(r, ordinality))) s
  )
  insert into tasker.children (task_uuid, step_uuid, attempt, number, depth, awaited, child_uuid, error)
  select a.task_uuid, a.step_uuid, a.attempt, a.number, a.depth, a.awaited,
    case when a.problem is null then s.task_uuid end, coalesce(a.problem, s.error)
  from asked a join submitted s on s.ordinal = a.ordinal;
  perform set_config('tasker.starting_children', '', true);

  update tasker.tasks t
  set parent_task_uuid = c.task_uuid, parent_step_uuid = c.step_uuid, parent_attempt = c.attempt,
      parent_correlation_id = p.correlation_id, root_link = r->>'link',
      trace_flags = t.trace_flags | case when (r->>'may_be_kept')::boolean then 128 else 0 end
  from jsonb_array_elements(p_requests) r
  join tasker.children c on c.task_uuid = (r->>'task')::uuid and c.step_uuid = (r->>'step')::uuid and c.attempt = (r->>'attempt')::int
  join tasker.tasks p on p.task_uuid = c.task_uuid
  where t.task_uuid = c.child_uuid;

  -- There is nothing to wait for.
  insert into pgmq.q_task_requests (vt, message)
  select clock_timestamp(), jsonb_build_object('v', 1, 'type', 'child', 'task', c.task_uuid, 'step', c.step_uuid, 'attempt', c.attempt)
  from jsonb_array_elements(p_requests) r
  join tasker.children c on c.task_uuid = (r->>'task')::uuid and c.step_uuid = (r->>'step')::uuid and c.attempt = (r->>'attempt')::int
  where c.child_uuid is null or not c.awaited;
  if found then
    perform tasker.wake('task_requests');
  end if;
end
$$;

-- As in 0013, and the reason of a failure stays in its namespace.
create or replace function tasker.child_ends(p_tasks uuid[], p_steps uuid[], p_attempts int[])
returns table (step_uuid uuid, attempt int, output jsonb, error_type text, error text, link text)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select c.step_uuid, c.attempt,
    case when c.error is not null then null
      when not c.awaited then jsonb_build_object('task', c.child_uuid) else o.output end,
    -- Templates that start each other end at the first refusal: were it tried again at each of the
    -- levels above, it would be millions of tasks.
    case when c.error is not null and c.depth > 16 then 'nested_too_deep'
      when c.error is not null then 'child_not_created'
      when not c.awaited then null
      when t.state = 'error' and t.error_type = 'nested_too_deep' then t.error_type
      when t.state in ('error', 'cancelled') then 'child_failed'
      when o.problem is not null then 'output_too_large' end,
    case when c.error is not null then format('the task could not be created: %s', c.error)
      when not c.awaited then null
      -- The reason of a parent is shown to whoever may see the parent, so what another namespace says of
      -- its own failure stays there.
      when t.state in ('error', 'cancelled') then format('task %s of template %s %s%s', c.child_uuid, p.name,
        case t.state when 'error' then 'failed' else 'was cancelled' end,
        case when t.namespace = w.namespace then left(coalesce(': ' || t.reason, ''), 600)
          else format('; who may see namespace %s finds the reason there', t.namespace) end)
      when o.problem is not null then format('task %s: %s', c.child_uuid, o.problem) end,
    case when not c.awaited and c.child_uuid is not null
      then format('00-%s-%s-%s', encode(t.trace_id, 'hex'), encode(t.root_span_id, 'hex'), lpad(to_hex(t.trace_flags & 1), 2, '0')) end
  from (
    select u.task_uuid, u.step_uuid, u.attempt, s.namespace
    from unnest(p_tasks, p_steps, p_attempts) u(task_uuid, step_uuid, attempt)
    left join tasker.tasks s on s.task_uuid = u.task_uuid
  ) w
  join tasker.children c on c.task_uuid = w.task_uuid and c.step_uuid = w.step_uuid and c.attempt = w.attempt
  left join tasker.tasks t on t.task_uuid = c.child_uuid
  left join tasker.templates p on p.template_id = t.template_id
  left join lateral tasker.task_output(c.child_uuid) o on c.awaited and t.state in ('complete', 'resolved_manually')
  where c.error is not null or not c.awaited or t.finished_at is not null
$$;

-- As in 0010, and a run that is refused does not cost the one before.
create or replace function tasker.fire_schedule(p_schedule uuid, p_tick timestamptz, p_kind text default 'tick', out task_uuid uuid, out problem text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_schedule tasker.schedules;
  v_state    text;
  v_tick     text := to_char(p_tick at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS')
                     || case when p_tick = date_trunc('second', p_tick) then 'Z' else to_char(p_tick at time zone 'UTC', '.US"Z"') end;
  v_task     uuid;
  v_problem  text;
begin
  select s.* into v_schedule from tasker.schedules s where s.schedule_uuid = p_schedule for no key update;
  if v_schedule.overlap <> 'allow' and v_schedule.last_task is not null then
    select t.state into v_state from tasker.tasks t
    where t.task_uuid = v_schedule.last_task and t.state not in ('complete', 'error', 'cancelled', 'resolved_manually');
    if v_state is not null and v_schedule.overlap = 'skip' then
      v_problem := format('the run of %s was skipped: task %s is still %s', v_tick, v_schedule.last_task, tasker.status_word(v_state));
      update tasker.schedules s set last_at = p_tick, skipped = s.skipped + 1, problem = v_problem where s.schedule_uuid = p_schedule;
      problem := v_problem;
      return;
    end if;
  end if;

  select t.task_uuid, t.error into v_task, v_problem
  from tasker.submit_tasks(jsonb_build_array(jsonb_build_object(
    'namespace', v_schedule.namespace, 'template', v_schedule.template, 'version', v_schedule.version,
    -- Neither text has a character that JSON would escape.
    'input', replace(replace(v_schedule.input::text, '${schedule.at}', v_tick), '${schedule.name}', v_schedule.name)::jsonb,
    'priority', v_schedule.priority,
    'correlation_id', format('%s/%s@%s', v_schedule.namespace, v_schedule.name, v_tick),
    'idempotency_key', format('schedule/%s/%s/%s', p_schedule, p_kind, v_tick)))) t;
  v_problem := format('the run of %s was refused: %s', v_tick, v_problem);
  -- The run before ends only for one that has come.
  if v_task <> v_schedule.last_task and v_state is not null then
    perform tasker.cancel_task(task => v_schedule.last_task, reason => format('the run of %s has come', v_tick),
      actor => format('schedule %s/%s', v_schedule.namespace, v_schedule.name));
  end if;
  update tasker.schedules s
  set last_at = p_tick, last_task = coalesce(v_task, s.last_task), runs = s.runs + (v_task is not null)::int,
      problem = case when v_task is null then v_problem end
  where s.schedule_uuid = p_schedule;
  if v_task is null then
    insert into tasker.counters (name, n) values ('schedule_refused', 1);
    problem := v_problem;
  end if;
  task_uuid := v_task;
end
$$;

revoke all on function tasker.crossings, tasker.barred, tasker.check_template_crossings, tasker.adopt_template,
  tasker.crossing_problem, tasker.open_tasks, tasker.refuse_beyond_limit, tasker.set_open_tasks_limit from public;
