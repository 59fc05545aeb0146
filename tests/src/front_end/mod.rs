// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The front-end (VMM and driver side) of a vhost-user connection.
