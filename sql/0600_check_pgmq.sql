-- pgflow 0.14 returns and reads messages with headers, which pgmq has from 1.5.0 on.
-- Called by: the installer, which asks the same before it begins; whoever applies the printed SQL. Locks: none.
-- Failure: aborts the install.
do $$
begin
    if not exists (
        select from pg_catalog.pg_attribute as a
        where a.attrelid = to_regclass('pgmq.message_record') and a.attname = 'headers' and not a.attisdropped
    ) then
        raise exception 'pgflow 0.14 needs pgmq 1.5.0 or later'
            using errcode = 'feature_not_supported',
                  detail = 'The type pgmq.message_record has no attribute "headers".',
                  hint = 'Upgrade the extension pgmq, or install pgflow 0.7.';
    end if;
end;
$$;
