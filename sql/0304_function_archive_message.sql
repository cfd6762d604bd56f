-- Moves a task's message from its queue to the queue's archive; nothing if it is not there.
-- Called by: `complete_task`, `fail_task`. Locks: the message. Failure: the caller's.
--
-- In the columns that every pgmq since 1.4.4 has (pgflow's messages carry no headers), and in two statements that are next to
-- nothing to plan: pgmq.archive does the same in one that takes twice as long, nearly all of it planning.
create or replace function pgflow._archive_message(flow_slug text, message_id bigint)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_table   text := lower(_archive_message.flow_slug);
    v_message record;
begin
    execute format('delete from pgmq.%I where msg_id = $1 returning msg_id, read_ct, enqueued_at, vt, message', 'q_' || v_table)
    into v_message
    using _archive_message.message_id;
    if v_message.msg_id is not null then
        execute format('insert into pgmq.%I (msg_id, read_ct, enqueued_at, vt, message) values ($1, $2, $3, $4, $5)', 'a_' || v_table)
        using v_message.msg_id, v_message.read_ct, v_message.enqueued_at, v_message.vt, v_message.message;
    end if;
end;
$$;
