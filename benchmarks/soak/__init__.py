"""A soak of the real server: many scenes, too little memory, cancels and moves; what must hold."""
