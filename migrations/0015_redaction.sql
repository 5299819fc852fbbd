-- The redaction policy of every process that has none of its own: see docs/telemetry.md. Processes
-- read it when they start; without a row the built-in one holds.
create table tasker.redaction (
  only_row  boolean primary key default true check (only_row),
  policy    jsonb not null
);

-- Sets it; null takes it away. Checked by whoever reads it: `tasker redaction set` refuses a bad one.
create function tasker.set_redaction(policy jsonb, actor text default session_user) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
begin
  if not tasker.is_owner() then
    raise exception 'policy: only the owner of the schema sets it' using errcode = '42501';
  end if;
  if policy is not null and (jsonb_typeof(policy) <> 'object' or jsonb_typeof(policy->'version') is distinct from 'string'
      or octet_length(policy::text) > 65536) then
    raise exception 'policy: must be a JSON object with a version, of 64 KiB at most' using errcode = '22023';
  end if;
  if policy is null then
    delete from tasker.redaction;
  else
    insert into tasker.redaction (policy) values (policy)
    on conflict on constraint redaction_pkey do update set policy = excluded.policy;
  end if;
  insert into tasker.audit (subject, action, actor, reason)
  values ('redaction', 'redaction.set', left(actor, 100), coalesce(policy->>'version', 'built-in'));
end
$$;

-- For workers too, which may read no table; a role needs to be granted it.
create function tasker.redaction() returns jsonb
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$ select policy from tasker.redaction $$;

revoke all on function tasker.set_redaction(jsonb, text), tasker.redaction() from public;
