// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs under test: where they are, how they start and end.
