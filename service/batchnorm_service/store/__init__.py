"""Where records live: a table with compare-and-set, nothing more. It knows no torch: a record is a stamp and bytes."""
