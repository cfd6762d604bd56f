//! Words that may stand before `(` in a statement and run nothing but Postgres' own code: keywords, sized types, and the
//! functions of `pg_catalog` (all but those called `pg_…`, and those that run a text). Not whether they write, nor what they do to a session: that is
//! told elsewhere. Called by `effects.rs`.

/// In byte order. From `pg_proc` of Postgres 15, and what later versions added.
#[rustfmt::skip]
const WORDS: &[&str] = &[
    "abbrev", "abs", "acldefault", "aclexplode", "acos", "acosd", "acosh", "age", "all", "amvalidate", "analyze", "and",
    "any", "any_value", "anyarray_send", "anycompatiblearray_send", "area", "array", "array_agg", "array_dims",
    "array_fill", "array_length", "array_lower", "array_ndims", "array_position", "array_positions", "array_remove",
    "array_replace", "array_reverse", "array_sample", "array_send", "array_shuffle", "array_sort", "array_to_json",
    "array_to_string", "array_to_tsvector", "array_upper", "as", "ascii", "asin", "asind", "asinh", "atan", "atan2",
    "atan2d", "atand", "atanh", "avg", "begin", "between", "binary_upgrade_create_empty_extension",
    "binary_upgrade_set_missing_value", "binary_upgrade_set_next_array_pg_type_oid",
    "binary_upgrade_set_next_heap_pg_class_oid", "binary_upgrade_set_next_heap_relfilenode",
    "binary_upgrade_set_next_index_pg_class_oid", "binary_upgrade_set_next_index_relfilenode",
    "binary_upgrade_set_next_multirange_array_pg_type_oid", "binary_upgrade_set_next_multirange_pg_type_oid",
    "binary_upgrade_set_next_pg_authid_oid", "binary_upgrade_set_next_pg_enum_oid",
    "binary_upgrade_set_next_pg_tablespace_oid", "binary_upgrade_set_next_pg_type_oid",
    "binary_upgrade_set_next_toast_pg_class_oid", "binary_upgrade_set_next_toast_relfilenode",
    "binary_upgrade_set_record_init_privs", "bit", "bit_and", "bit_count", "bit_length", "bit_or", "bit_send", "bit_xor",
    "bittypmodin", "bool", "bool_and", "bool_or", "boolsend", "box", "box_send", "bpchar", "bpcharsend",
    "bpchartypmodin", "brin_bloom_summary_send", "brin_desummarize_range", "brin_minmax_multi_summary_send",
    "brin_summarize_new_values", "brin_summarize_range", "broadcast", "btrim", "by", "byteasend", "cardinality", "case",
    "casefold", "cash_send", "cash_words", "cast", "cbrt", "ceil", "ceiling", "center", "char", "char_length",
    "character", "character_length", "charsend", "check", "chr", "cidr", "cidr_send", "cidsend", "circle", "circle_send",
    "clock_timestamp", "coalesce", "col_description", "columns", "concat", "concat_ws", "conflict", "convert",
    "convert_from", "convert_to", "copy", "corr", "cos", "cosd", "cosh", "cot", "cotd", "count", "covar_pop",
    "covar_samp", "crc32", "crc32c", "cube", "cume_dist", "current_database", "current_query", "current_schema",
    "current_schemas", "current_setting", "current_user", "currtid2", "currval", "cursor_to_xmlschema",
    "database_to_xml", "database_to_xml_and_xmlschema", "database_to_xmlschema", "date", "date_add", "date_bin",
    "date_part", "date_send", "date_subtract", "date_trunc", "datemultirange", "daterange", "daterange_canonical",
    "daterange_subdiff", "dec", "decimal", "decode", "degrees", "dense_rank", "dexp", "diagonal", "diameter", "distinct",
    "div", "dlog1", "dlog10", "dround", "dtrunc", "else", "encode", "enum_first", "enum_last", "enum_range", "enum_send",
    "escape", "every", "except", "exists", "exp", "explain", "extract", "factorial", "family", "filter", "first_value",
    "float", "float4", "float4send", "float8", "float8send", "floor", "fmgr_c_validator", "fmgr_internal_validator",
    "fmgr_sql_validator", "format", "format_type", "from", "gcd", "gen_random_uuid", "generate_series",
    "generate_subscripts", "get_bit", "get_byte", "get_current_ts_config", "getdatabaseencoding", "getpgusername",
    "gin_clean_pending_list", "greatest", "group", "grouping", "groups", "has_any_column_privilege",
    "has_column_privilege", "has_database_privilege", "has_foreign_data_wrapper_privilege", "has_function_privilege",
    "has_language_privilege", "has_parameter_privilege", "has_schema_privilege", "has_sequence_privilege",
    "has_server_privilege", "has_table_privilege", "has_tablespace_privilege", "has_type_privilege", "having", "height",
    "host", "hostmask", "if", "ilike", "in", "inet_client_addr", "inet_client_port", "inet_send", "inet_server_addr",
    "inet_server_port", "initcap", "int", "int2", "int2int4_sum", "int2send", "int2vectorsend", "int4", "int4inc",
    "int4multirange", "int4range", "int4range_canonical", "int4range_subdiff", "int4send", "int8", "int8_sum",
    "int8multirange", "int8range", "int8range_canonical", "int8range_subdiff", "int8send", "intersect", "interval",
    "interval_send", "intervaltypmodin", "into", "is", "is_normalized", "isclosed", "isempty", "isfinite",
    "ishorizontal", "isopen", "isparallel", "isperp", "isvertical", "join", "json", "json_agg", "json_array",
    "json_array_elements", "json_array_elements_text", "json_array_length", "json_arrayagg", "json_build_array",
    "json_build_object", "json_each", "json_each_text", "json_exists", "json_object", "json_object_agg",
    "json_object_keys", "json_objectagg", "json_populate_record", "json_populate_recordset", "json_query", "json_scalar",
    "json_send", "json_serialize", "json_strip_nulls", "json_table", "json_to_record", "json_to_recordset",
    "json_to_tsvector", "json_typeof", "json_value", "jsonb", "jsonb_agg", "jsonb_array_elements",
    "jsonb_array_elements_text", "jsonb_array_length", "jsonb_build_array", "jsonb_build_object", "jsonb_each",
    "jsonb_each_text", "jsonb_insert", "jsonb_object", "jsonb_object_agg", "jsonb_object_keys", "jsonb_path_exists",
    "jsonb_path_exists_tz", "jsonb_path_match", "jsonb_path_match_tz", "jsonb_path_query", "jsonb_path_query_array",
    "jsonb_path_query_array_tz", "jsonb_path_query_first", "jsonb_path_query_first_tz", "jsonb_path_query_tz",
    "jsonb_populate_record", "jsonb_populate_recordset", "jsonb_pretty", "jsonb_send", "jsonb_set", "jsonb_set_lax",
    "jsonb_strip_nulls", "jsonb_to_record", "jsonb_to_recordset", "jsonb_to_tsvector", "jsonb_typeof", "jsonpath_send",
    "justify_days", "justify_hours", "justify_interval", "key", "lag", "last_value", "lastval", "lateral", "lcm", "lead",
    "least", "left", "length", "like", "like_escape", "limit", "line", "line_send", "ln", "lo_close", "lo_creat",
    "lo_create", "lo_export", "lo_from_bytea", "lo_get", "lo_import", "lo_lseek", "lo_lseek64", "lo_open", "lo_put",
    "lo_tell", "lo_tell64", "lo_truncate", "lo_truncate64", "lo_unlink", "log", "log10", "loread", "lower", "lower_inc",
    "lower_inf", "lowrite", "lpad", "lseg", "lseg_send", "ltrim", "macaddr", "macaddr8", "macaddr8_send",
    "macaddr8_set7bit", "macaddr_send", "make_date", "make_interval", "make_time", "make_timestamp", "make_timestamptz",
    "makeaclitem", "masklen", "materialized", "max", "md5", "merge_action", "min", "min_scale", "mod", "mode", "money",
    "multirange", "multirange_send", "mxid_age", "name", "nameconcatoid", "namesend", "netmask", "network", "nextval",
    "normalize", "not", "notlike", "now", "npoints", "nth_value", "ntile", "nullif", "num_nonnulls", "num_nulls",
    "numeric", "numeric_div_trunc", "numeric_exp", "numeric_inc", "numeric_ln", "numeric_log", "numeric_send",
    "numeric_sqrt", "numerictypmodin", "nummultirange", "numnode", "numrange", "numrange_subdiff", "obj_description",
    "octet_length", "offset", "oid", "oidsend", "oidvectorsend", "oidvectortypes", "on", "or", "order", "over",
    "overlaps", "overlay", "parse_ident", "partition", "passing", "path", "path_send", "pclose", "percent_rank",
    "percentile_cont", "percentile_disc", "phraseto_tsquery", "pi", "plainto_tsquery", "point", "point_send",
    "poly_send", "polygon", "popen", "position", "postgresql_fdw_validator", "pow", "power", "precision", "primary",
    "querytree", "quote_ident", "quote_literal",
    "quote_nullable", "radians", "radius", "random", "random_normal", "range", "range_agg", "range_intersect_agg",
    "range_merge", "range_send", "rank", "record_send", "references", "regclass", "regclasssend", "regcollationsend",
    "regconfigsend", "regdictionarysend", "regexp_count", "regexp_instr", "regexp_like", "regexp_match",
    "regexp_matches", "regexp_replace", "regexp_split_to_array", "regexp_split_to_table", "regexp_substr",
    "regnamespacesend", "regoperatorsend", "regopersend", "regproceduresend", "regprocsend", "regr_avgx", "regr_avgy",
    "regr_count", "regr_intercept", "regr_r2", "regr_slope", "regr_sxx", "regr_sxy", "regr_syy", "regrolesend",
    "regtypesend", "repeat", "replace", "returning", "reverse", "right", "rollup", "round", "row", "row_number",
    "row_security_active", "row_to_json", "rows", "rpad", "rtrim", "satisfies_hash_partition", "scale", "schema_to_xml",
    "schema_to_xml_and_xmlschema", "schema_to_xmlschema", "select", "session_user", "set", "set_bit", "set_byte",
    "set_config", "set_masklen", "sets", "setseed", "setval", "setweight", "sha224", "sha256", "sha384", "sha512",
    "shobj_description", "sign", "similar", "similar_escape", "similar_to_escape", "sin", "sind", "sinh", "slope",
    "some", "split_part", "sqrt", "starts_with", "statement_timestamp", "stddev", "stddev_pop", "stddev_samp",
    "string_agg", "string_to_array", "string_to_table", "strip", "strpos", "substr", "substring", "sum", "table_to_xml",
    "table_to_xml_and_xmlschema", "table_to_xmlschema", "tan", "tand", "tanh", "text", "textlen", "textsend", "then",
    "tidsend", "time", "time_send", "timeofday", "timestamp", "timestamp_send", "timestamptypmodin", "timestamptz",
    "timestamptz_send", "timestamptztypmodin", "timetypmodin", "timetz", "timetz_send", "timetztypmodin", "timezone",
    "to_ascii", "to_bin", "to_char", "to_date", "to_hex", "to_json", "to_jsonb", "to_number", "to_oct", "to_regclass",
    "to_regcollation", "to_regnamespace", "to_regoper", "to_regoperator", "to_regproc", "to_regprocedure", "to_regrole",
    "to_regtype", "to_timestamp", "to_tsquery", "to_tsvector", "transaction_timestamp", "translate", "treat", "trim",
    "trim_array", "trim_scale", "trunc", "ts_debug", "ts_delete", "ts_filter", "ts_headline", "ts_lexize", "ts_parse",
    "ts_rank", "ts_rank_cd", "ts_token_type", "tsmultirange", "tsquery_phrase", "tsquerysend",
    "tsrange", "tsrange_subdiff", "tstzmultirange", "tstzrange", "tstzrange_subdiff", "tsvector_to_array",
    "tsvectorsend", "txid_current", "txid_current_if_assigned", "txid_current_snapshot", "txid_snapshot_send",
    "txid_snapshot_xip", "txid_snapshot_xmax", "txid_snapshot_xmin", "txid_status", "txid_visible_in_snapshot", "union",
    "unique", "unistr", "unknownsend", "unnest", "update", "upper", "upper_inc", "upper_inf", "using", "uuid",
    "uuid_send", "uuidv4", "uuidv7", "values", "var_pop", "var_samp", "varbit", "varbit_send", "varbittypmodin",
    "varchar", "varcharsend", "varchartypmodin", "variance", "varying", "verbose", "version", "void_send",
    "websearch_to_tsquery", "when", "where", "width", "width_bucket", "with", "within", "xid", "xid8send", "xidsend",
    "xml", "xml_is_well_formed", "xml_is_well_formed_content", "xml_is_well_formed_document", "xml_send", "xmlagg",
    "xmlattributes", "xmlcomment", "xmlconcat", "xmlelement", "xmlexists", "xmlforest", "xmlparse", "xmlpi", "xmlroot",
    "xmlserialize", "xmltable", "xmlvalidate", "xpath", "xpath_exists",
];

/// `name` in lower case.
pub(super) fn is_known(name: &[u8]) -> bool {
    name.starts_with(b"pg_")
        || WORDS
            .binary_search_by(|word| word.as_bytes().cmp(name))
            .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_in_order_and_found() {
        assert!(WORDS.is_sorted());
        for known in ["abs", "count", "lower", "in", "values", "pg_sleep"] {
            assert!(is_known(known.as_bytes()), "{known}");
        }
        assert!(!is_known(b"my_function") && !is_known(b""));
    }
}
