-- Gone from 0.14, whose workers call pgmq.read_with_poll. Locks: the function. Failure: aborts the install.
drop function if exists pgflow.read_with_poll(text, integer, integer, integer, integer, jsonb);
