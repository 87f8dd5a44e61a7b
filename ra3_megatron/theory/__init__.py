"""The paper's statements as numbers: exact small MDPs with options. numpy only; imports no other room."""
