"""Stores: tables of records with compare-and-set. A record is a stamp and bytes; nothing here depends on torch."""
