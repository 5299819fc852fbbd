-- Where traces go, as operators say it for every process, and what the processes make of it.

-- Values as text by the key of the setting; the scope is `*`, or a namespace for `detail` and
-- `areas`. Never a secret: headers come from the environment or a file.
create table tasker.trace_settings (
  scope   text not null default '*',
  key     text not null,
  value   text not null,
  set_at  timestamptz not null default clock_timestamp(),
  set_by  text not null,
  primary key (scope, key),
  constraint trace_settings_value_is_short check (octet_length(value) <= 2000 and value !~ '[[:cntrl:]]'),
  constraint trace_settings_have_no_secret check (key not in ('headers', 'certificate') and value !~ '://[^/?#]*@'),
  constraint trace_settings_of_a_namespace check (scope = '*' or key in ('detail', 'areas'))
);

-- What each process does with its spans at this moment. Nobody misses it after a crash.
create unlogged table tasker.trace_processes (
  process     uuid primary key,
  kind        text not null,
  name        text not null,
  version     text not null,
  started_at  timestamptz not null default clock_timestamp(),
  seen_at     timestamptz not null default clock_timestamp(),
  state       jsonb not null
) with (fillfactor = 50);

-- Merges values into a scope (null forgets a key), audited, and wakes every process. All or
-- nothing.
create function tasker.set_trace_settings(
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
  if scope is null or scope !~ '^([*]|[a-z](_?[a-z0-9])*)$' then
    raise exception 'scope: must be a namespace, or * for every process' using errcode = '22023';
  end if;
  delete from tasker.trace_settings t
  where t.scope = set_trace_settings.scope
    and t.key in (select e.key from jsonb_each(settings) e where e.value = 'null');
  insert into tasker.trace_settings (scope, key, value, set_by)
  select set_trace_settings.scope, e.key, e.value, left(set_trace_settings.actor, 100)
  from jsonb_each_text(settings) e where e.value is not null
  on conflict on constraint trace_settings_pkey
    do update set value = excluded.value, set_at = excluded.set_at, set_by = excluded.set_by;
  insert into tasker.audit (subject, action, actor, reason)
  values ('traces of ' || set_trace_settings.scope, 'set_trace_settings', left(set_trace_settings.actor, 100), left(settings::text, 1000));
  perform pg_notify('tasker', 'trace');
exception
  when check_violation then
    raise exception 'settings: a value is too long, holds a control character or a password, or is not one that may be stored there'
      using errcode = '22023';
end
$$;

-- A trace is looked for by its id. The column never changes, so updates of a task stay HOT.
create index tasks_by_trace on tasker.tasks using hash (trace_id);
