"""Problems with verifiable rewards: where they come from, and what makes an answer right."""
