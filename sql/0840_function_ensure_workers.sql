-- Calls the edge function of every enabled worker function that has nobody at work: no live worker, and not called within its
-- debounce. On somebody's own machine (`is_local`) it calls them all, there to be restarted at once. Returns those called.
-- Called by: cron (`setup_ensure_workers_cron`). Locks: the rows of what it calls, SKIP LOCKED, until commit. Failure: the
-- caller's, and nothing is called, since pg_net sends at commit.
-- Needs Supabase: pg_net to call with, and, elsewhere than locally, the vault for where to and with which key. What is missing is
-- told by a NOTICE, and nothing is called.
create or replace function pgflow.ensure_workers()
returns table (function_name text, invoked boolean, request_id bigint)
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_local   boolean := pgflow.is_local();
    v_base    text;
    v_project text;
    v_key     text;
    v_headers jsonb := '{"Content-Type": "application/json"}';
    v_due     text[];
    v_name    text;
begin
    if not exists (
        select from pg_catalog.pg_proc as p
        where p.pronamespace = to_regnamespace('net') and p.proname = 'http_post'
    ) then
        raise notice 'pgflow.ensure_workers calls nothing: it needs the extension pg_net';
        return;
    end if;

    if v_local then
        v_base := 'http://kong:8000/functions/v1';
    else
        if to_regclass('vault.decrypted_secrets') is null then
            raise notice 'pgflow.ensure_workers calls nothing: it needs the extension supabase_vault';
            return;
        end if;
        -- An empty secret is none.
        execute
            'select'
            '  max(s.decrypted_secret) filter (where s.name = ''supabase_project_id''),'
            '  coalesce('
            '    max(s.decrypted_secret) filter (where s.name = ''pgflow_auth_secret''),'
            '    max(s.decrypted_secret) filter (where s.name = ''supabase_service_role_key''))'
            ' from vault.decrypted_secrets as s'
            ' where s.decrypted_secret <> '''''
        into v_project, v_key;
        if v_project is null or v_key is null then
            raise notice 'pgflow.ensure_workers calls nothing: the vault lacks %',
                case
                    when v_project is null then 'the secret supabase_project_id'
                    else 'both of the secrets pgflow_auth_secret and supabase_service_role_key'
                end;
            return;
        end if;
        v_base := 'https://' || v_project || '.supabase.co/functions/v1';
        v_headers := v_headers || jsonb_build_object('Authorization', 'Bearer ' || v_key);
    end if;

    with due as (
        select wf.function_name
        from pgflow.worker_functions as wf
        where wf.enabled
          and (v_local
               or ((wf.last_invoked_at is null or wf.last_invoked_at < clock_timestamp() - wf.debounce)
                   and not exists (
                       select from pgflow.workers as w
                       where w.function_name = wf.function_name
                         and w.stopped_at is null and w.deprecated_at is null
                         and w.last_heartbeat_at > clock_timestamp() - wf.debounce)))
        order by wf.function_name
        for no key update skip locked
    ),
    called as (
        update pgflow.worker_functions as wf
        set last_invoked_at = clock_timestamp()
        from due
        where wf.function_name = due.function_name
        returning wf.function_name
    )
    select array_agg(called.function_name order by called.function_name) into v_due from called;

    foreach v_name in array coalesce(v_due, '{}') loop
        execute 'select net.http_post(url => $1, headers => $2, body => $3)'
        into request_id
        using v_base || '/' || v_name, v_headers, '{}'::jsonb;
        function_name := v_name;
        invoked := true;
        return next;
    end loop;
end;
$$;
