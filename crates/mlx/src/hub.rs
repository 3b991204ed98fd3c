//! A model named on the command line becomes a path: a local one as it is, a hub id by downloading it.
