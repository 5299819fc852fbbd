-- Who may use the HTTP API, and what its lists are read by.

-- A key is `tsk_<key_id>_<secret>`. The secret has 256 random bits, so one SHA-256 of it says
-- nothing about it, and no slower hash would protect it better.
create table tasker.api_keys (
  key_id       text primary key,
  name         text not null,
  secret_hash  bytea not null,
  role         text not null,
  -- Null: what the role may do.
  scopes       text[],
  -- Null: every namespace.
  namespaces   text[],
  created_by   text not null,
  created_at   timestamptz not null default clock_timestamp(),
  expires_at   timestamptz,
  revoked_at   timestamptz,
  constraint api_keys_role_is_known check (role in ('viewer', 'operator', 'admin')),
  constraint api_keys_hash_has_its_length check (length(secret_hash) = 32),
  constraint api_keys_name_is_short check (octet_length(name) between 1 and 100 and name !~ '[[:cntrl:]]'),
  constraint api_keys_namespaces_are_some check (cardinality(namespaces) > 0)
);
create unique index api_keys_by_name on tasker.api_keys (name) where revoked_at is null;

-- A browser that signed in with a key, or (`once`) a link that signs one in. It ends with its key.
create table tasker.api_sessions (
  session_hash  bytea primary key,
  key_id        text not null references tasker.api_keys on delete cascade,
  once          boolean not null default false,
  created_at    timestamptz not null default clock_timestamp(),
  expires_at    timestamptz not null
);

-- Makes a key. What was long over is forgotten.
create function tasker.create_api_key(
  p_key_id text, p_name text, p_secret_hash bytea, p_role text, p_scopes text[], p_namespaces text[],
  p_expires_at timestamptz, p_actor text
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from tasker.api_sessions where expires_at < clock_timestamp();
  delete from tasker.api_keys k
  where least(k.expires_at, k.revoked_at) < clock_timestamp() - interval '90 days';
  -- A name is taken until its key is over.
  update tasker.api_keys k set revoked_at = k.expires_at
  where k.name = p_name and k.revoked_at is null and k.expires_at < clock_timestamp();
  insert into tasker.api_keys (key_id, name, secret_hash, role, scopes, namespaces, expires_at, created_by)
  values (p_key_id, p_name, p_secret_hash, p_role, p_scopes, p_namespaces, p_expires_at, left(p_actor, 100));
  insert into tasker.audit (subject, action, actor, details)
  values ('key ' || p_name, 'create', left(p_actor, 100),
    jsonb_build_object('key_id', p_key_id, 'role', p_role, 'scopes', p_scopes, 'namespaces', p_namespaces, 'expires_at', p_expires_at));
end
$$;

-- Revokes the key of this name or id; false if no valid key has it.
create function tasker.revoke_api_key(p_name text, p_actor text) returns boolean
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
  insert into tasker.audit (subject, action, actor) values ('key ' || v_name, 'revoke', left(p_actor, 100));
  return true;
end
$$;

revoke all on function tasker.create_api_key, tasker.revoke_api_key from public;

-- What lists of tasks are read by: docs/adr/0008. The partial ones on errors and on what was ended by
-- hand are free for a task that goes well, since the columns in their conditions never change then.
-- Every text is >= '': a query that says "is not null" is not led along the first of each kind, on
-- whose order the planner would look for the failures of one template among those of all.
create index tasks_open on tasker.tasks (task_uuid) where finished_at is null;
create index tasks_failed on tasker.tasks (task_uuid) where error_type >= '';
create index tasks_failed_by_type on tasker.tasks (error_type, task_uuid) where error_type is not null;
create index tasks_failed_by_template on tasker.tasks (template_id, task_uuid) where error_type is not null;
create index tasks_ended_by_hand on tasker.tasks (task_uuid) where ended_by >= '';
create index tasks_ended_by_hand_by_template on tasker.tasks (template_id, task_uuid) where ended_by is not null;
create index tasks_by_template on tasker.tasks (template_id, task_uuid);

-- What moved a moment ago, for everybody who watches. The log only grows, so a summary of each
-- megabyte is enough; a row costs it nothing.
create index transitions_by_time on tasker.transitions using brin (at) with (pages_per_range = 64, autosummarize = on);
