"""File formats of ECG recordings, one module each. A reader gives an `EcgRecord` or raises `Rejected`."""
